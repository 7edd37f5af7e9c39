"""Streamed text equals the decoded whole for any tokens and chunks; stop strings, hold-back and context."""

from __future__ import annotations

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sparsejax.engine.detokenizer import Detokenizer, TextDecoder
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.stop import StopMatcher

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, world!\n\nNew paragraph: 12345 = 5 * 2469",
    "naïve café Zürich façade über\tStraße — “quotes” … ½",
    "日本語のテキスト 한국어 русский язык العربية हिन्दी",
    "emoji 😀 👩‍👩‍👧 🏳️‍🌈 🇩🇪 done",
    "def f(x):\n    return x  # END stop STOP </s> Observation:",
] * 3


@functools.cache
def byte_level() -> Tokenizer:
    """GPT-2 style: every byte is a token, so characters fall apart over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Llama-2 style: readable pieces with a space mark, <0x..> tokens for the rest, first space dropped."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzé.,:", "▁the", "▁hello", "▁world", "▁▁", "▁▁▁", "ing", "語"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return tokenizer


class PlainTokenizer:
    """A tokenizer the library knows nothing about: one byte per token."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i < 256 or not skip_special_tokens).decode(errors="replace")


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "plain": PlainTokenizer}


def vocab_size(kind: str) -> int:
    return 256 if kind == "plain" else KINDS[kind]().get_vocab_size() + 5  # some ids nobody knows


def stream(detokenizer: Detokenizer, ids, seed=0) -> list[str]:
    """Deltas of random chunks of ids, and the final one."""
    rng, start, deltas = random.Random(seed), 0, []
    while start < len(ids):
        size = rng.choice([0, 1, 1, 2, 3, 8])
        deltas.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*deltas, detokenizer.finish()]


def id_lists(kind: str):
    uniform = st.lists(st.integers(0, vocab_size(kind) - 1), max_size=60)
    if kind == "plain":
        return uniform
    text = st.sampled_from(CORPUS).map(lambda t: KINDS[kind]().encode(t, add_special_tokens=False).ids)
    return st.one_of(uniform, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_special", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_is_the_decoded_whole(kind, skip_special, data):
    ids = data.draw(id_lists(kind))
    tokenizer = KINDS[kind]()
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(skip_special_tokens=skip_special))
    deltas = stream(detokenizer, ids, data.draw(st.integers(0, 99)))
    whole = tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert "".join(deltas) == detokenizer.text == whole
    assert detokenizer.num_tokens == len(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_prompt_and_output_join(kind, data):
    """Readable prompts: the prompt's text plus the streamed text is the text of all ids."""
    tokenizer = KINDS[kind]()
    text = data.draw(st.text("abc hello the world.", max_size=30))
    prompt = list(text.encode()) if kind == "plain" else tokenizer.encode(text, add_special_tokens=False).ids
    ids = data.draw(id_lists(kind))
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams())
    stream(detokenizer, ids)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    assert before + detokenizer.text == tokenizer.decode(prompt + ids, skip_special_tokens=True)


def test_prompt_can_leave_a_character_open():
    tokenizer = byte_level()
    ids = tokenizer.encode("é😀!").ids
    for cut in range(len(ids)):
        detokenizer = Detokenizer(tokenizer, ids[:cut], SamplingParams())
        stream(detokenizer, ids[cut:])
        assert "é😀!".endswith(detokenizer.text) and detokenizer.text


@pytest.mark.parametrize("text", ["😀👩‍👩‍👧é日本語", "plain ascii", "mix 日本 and 😀."])
def test_never_half_a_character(text):
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    ids = tokenizer.encode(text).ids
    for token in ids:
        assert "\ufffd" not in detokenizer.push([token])
        assert text.startswith(detokenizer.text)
    assert detokenizer.text == text
    assert detokenizer.finish() == ""


def test_readable_text_is_not_delayed():
    """Without stop strings every token of plain text comes out at once."""
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    for token in tokenizer.encode(CORPUS[0]).ids:
        assert detokenizer.push([token]) == tokenizer.decode([token])


def test_endless_unreadable_output_stays_cheap():
    tokenizer = TextDecoder(byte_level())
    bad = [next(i for i in range(259) if byte_level().decode([i]) == "\ufffd")]
    detokenizer = Detokenizer(tokenizer, [], SamplingParams())
    lengths = set()
    for _ in range(400):
        detokenizer.push(bad)
        lengths.add(len(detokenizer._window._ids))
    detokenizer.finish()
    assert max(lengths) < 16
    assert detokenizer.text == byte_level().decode(bad * 400)


def earliest_stop(text: str, stops) -> tuple[int, str] | None:
    """Oracle: the match that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
    st.data(),
)
def test_stop_matcher_against_oracle(text, stops, include, data):
    """Whatever the chunks: text up to the first match, and all that is certain is out at each moment."""
    matcher = StopMatcher(stops, include=include)
    want = earliest_stop(text, stops)
    fed, released = 0, ""
    while fed < len(text):
        size = data.draw(st.integers(1, 6))
        released += matcher.feed(text[fed : fed + size])
        fed = min(fed + size, len(text))
        seen = text[:fed]
        found = earliest_stop(seen, stops)
        if found:
            break
        open_tails = [n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) for s in stops)]
        assert released == seen[: len(seen) - max(open_tails)]
    if want is None:
        assert matcher.matched is None
        assert released + matcher.flush() == text
    else:
        start, stop = want
        assert matcher.matched == stop
        assert released == (text[: start + len(stop)] if include else text[:start])
        assert matcher.feed("more") == "" and matcher.flush() == ""


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("include", [True, False])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_stop_strings_over_tokens(kind, include, data):
    """A stop string cut anywhere by tokens ends the text there, at the token that completes it."""
    tokenizer = KINDS[kind]()
    ids = data.draw(id_lists(kind))
    whole = tokenizer.decode(ids)
    if len(whole) < 3 or "\ufffd" in whole:
        return
    begin = data.draw(st.integers(0, len(whole) - 2))
    stop = whole[begin : begin + data.draw(st.integers(1, 6))]
    params = SamplingParams(stop=[stop, "never there"], include_stop_str_in_output=include)
    detokenizer = Detokenizer(tokenizer, [], params)
    deltas = stream(detokenizer, ids, data.draw(st.integers(0, 99)))
    at = whole.index(stop)
    assert detokenizer.stopped == stop
    assert "".join(deltas) == detokenizer.text == whole[: at + len(stop) * include]
    taken = ids[: detokenizer.num_tokens]
    assert stop in tokenizer.decode(taken)
    assert stop not in tokenizer.decode(taken[:-1])


def test_newline_byte_token_stops_at_once():
    """With byte fallback a line break is a byte token; the stop must not wait for the token after it."""
    tokenizer = byte_fallback()
    ids = tokenizer.encode("the\n\nthe", add_special_tokens=False).ids
    newline = tokenizer.token_to_id("<0x0A>")
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(stop="\n\n"))
    detokenizer.push(ids)
    assert detokenizer.stopped == "\n\n" and detokenizer.text == "the"
    assert detokenizer.num_tokens == [i for i, t in enumerate(ids) if t == newline][1] + 1


def test_no_stop_inside_min_tokens():
    tokenizer = byte_level()
    ids = tokenizer.encode("x STOP y STOP z").ids
    first = len(tokenizer.encode("x STOP").ids)
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(stop="STOP", min_tokens=first, max_tokens=99))
    stream(detokenizer, ids)
    assert detokenizer.text == "x STOP y " and detokenizer.stopped == "STOP"
    straddling = Detokenizer(tokenizer, [], SamplingParams(stop="STOP", min_tokens=first - 1, max_tokens=99))
    stream(straddling, ids)
    assert straddling.text == "x "


def test_transformers_tokenizer_and_shared_decoder(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    shared = TextDecoder(tokenizer)
    ids = tokenizer.encode("Hello 😀 world") + [tokenizer.eos_token_id]
    for given_tokenizer in (tokenizer, shared):
        for skip in (True, False):
            detokenizer = Detokenizer(given_tokenizer, [], SamplingParams(skip_special_tokens=skip))
            stream(detokenizer, ids)
            assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert shared.token_text(tokenizer.eos_token_id) == "</s>"


def test_without_tokenizer_or_text():
    for tokenizer, params in ((None, SamplingParams()), (byte_level(), SamplingParams(detokenize=False))):
        detokenizer = Detokenizer(tokenizer, [1, 2], params)
        assert not any(stream(detokenizer, [3, 4, 5]))
        assert detokenizer.text == "" and detokenizer.stopped is None and detokenizer.num_tokens == 3
