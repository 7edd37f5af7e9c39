"""Text in, text out: stop strings while streaming, whole characters only, chat, and bad words, end to end."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from transformers import PreTrainedTokenizerFast

from sparsejax import SamplingParams
from sparsejax.engine.request import RequestOutputKind
from sparsejax.errors import RequestError
from sparsejax.models.loaded import LoadedModel
from sparsejax.models.params import init_params
from tests.engine.models import tiny_engine, tiny_model
from tests.engine.test_detokenizer import byte_level

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}> {% endif %}"
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = ["Hello, world!", "naïve café", "日本語のテキスト 😀"]


@pytest.fixture(scope="module")
def engine():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>", chat_template=TEMPLATE)
    eos = (tokenizer.eos_token_id,)
    config = dataclasses.replace(tiny_model().config, vocab_size=len(tokenizer), eos_token_ids=eos)
    params = init_params(config, jax.random.key(3), jnp.float32, std=0.3)
    with tiny_engine(LoadedModel(config, params, None, jnp.dtype("float32")), tokenizer) as engine:
        yield engine


@pytest.fixture(scope="module")
def answers(engine):
    return [output.outputs[0] for output in engine.generate(PROMPTS, GREEDY)]


def test_text_is_the_decoded_tokens(engine, answers):
    for prompt, answer, output in zip(PROMPTS, answers, engine.generate(PROMPTS, GREEDY), strict=True):
        assert output.prompt == prompt
        assert engine.tokenizer.decode(answer.token_ids, skip_special_tokens=True) == answer.text


def test_streamed_text_is_the_text_and_never_half_a_character(engine, answers):
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        deltas = [choice.text for output in engine.stream(prompt, GREEDY) for choice in output.outputs]
        assert "".join(deltas) == answer.text
        whole = answer.text.rstrip("�")
        assert not any("�" in delta for delta in deltas) or "�" in whole or deltas[-1].endswith("�")


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text_and_are_held_back_while_streaming(engine, answers, include):
    text = answers[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = text.index(stop)
    expected = text[: cut + len(stop)] if include else text[:cut]
    params = dataclasses.replace(GREEDY, stop=[stop, "never there"], include_stop_str_in_output=include)
    (output,) = engine.generate(PROMPTS[0], params)
    (answer,) = output.outputs
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (expected, "stop", stop)
    assert len(answer.token_ids) < len(answers[0].token_ids)
    streamed = ""
    for delta in engine.stream(PROMPTS[0], params):
        streamed += "".join(choice.text for choice in delta.outputs)
        assert expected.startswith(streamed)
    assert streamed == expected
    assert engine.stats()["kv_live_pages"] == 0


def test_stop_token_ids_and_eos(engine, answers):
    ids = answers[0].token_ids
    stop = ids[len(ids) // 2]
    (output,) = engine.generate(PROMPTS[0], dataclasses.replace(GREEDY, stop_token_ids=[stop]))
    (answer,) = output.outputs
    assert answer.token_ids == ids[: ids.index(stop) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    (output,) = engine.generate(PROMPTS[0], dataclasses.replace(GREEDY, stop_token_ids=[stop], min_tokens=30))
    assert len(output.outputs[0].token_ids) >= 30
    assert stop not in output.outputs[0].token_ids[:30]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bad_words_of_one_or_more_tokens_never_appear(engine, length):
    """A bad word is the token sequence that its text encodes to; other spellings of the text are free."""
    (output,) = engine.generate(PROMPTS[1], dataclasses.replace(GREEDY, max_tokens=200))
    ids = output.outputs[0].token_ids

    def spelled(ids):
        return [ids[i : i + length] for i in range(len(ids) - length + 1)]

    word = next(
        text
        for part in spelled(ids)
        if engine.tokenizer.encode(text := engine.tokenizer.decode(part)) == part and text.isascii() and text.strip()
    )
    params = dataclasses.replace(GREEDY, max_tokens=200, bad_words=[word])
    (output,) = engine.generate(PROMPTS[1], params)
    assert engine.tokenizer.encode(word) not in spelled(output.outputs[0].token_ids)


def test_chat_renders_the_template(engine):
    talk = [{"role": "user", "content": "Hello"}]
    wanted = "<user>Hello\n> "
    (output,) = engine.chat(talk, GREEDY)
    assert output.prompt == wanted
    (plain,) = engine.generate([{"prompt_token_ids": engine.tokenizer.encode(wanted)}], GREEDY)
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert [o.prompt for o in engine.chat([talk, talk + talk], GREEDY)] == [wanted, "<user>Hello\n" + wanted]
    for bad in ([], ["hello"], [{"content": "x"}], "hello"):
        with pytest.raises(RequestError, match="messages|message 0"):
            engine.chat(bad)


def test_logprobs_carry_the_tokens_text(engine, answers):
    params = dataclasses.replace(GREEDY, max_tokens=5, logprobs=2)
    (output,) = engine.generate(PROMPTS[0], params)
    for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
        assert len(entry) == 2
        assert entry[token].rank == 1
        assert entry[token].decoded_token == engine.tokenizer.decode([token])


def test_no_detokenize(engine, answers):
    (output,) = engine.generate(PROMPTS[0], dataclasses.replace(GREEDY, detokenize=False))
    assert output.outputs[0].text == ""
    assert output.outputs[0].token_ids == answers[0].token_ids


def test_cumulative_outputs_grow(engine, answers):
    params = dataclasses.replace(GREEDY, output_kind=RequestOutputKind.CUMULATIVE)
    engine.add_request("r", PROMPTS[1], params)
    texts = []
    while engine.has_unfinished():
        texts += [output.outputs[0].text for output in engine.step()]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert texts[-1] == answers[1].text
