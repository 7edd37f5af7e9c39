"""A continued conversation gives the tokens of one sequence that was never interrupted, under every policy."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import pytest

from sparsejax import EngineConfig, SamplingParams
from sparsejax.errors import ConfigError, ConversationError, RequestError
from tests.cache.test_latent import stored_as
from tests.engine.models import random_prompts, text_engine, tiny_engine, warm_greedy

SMALL = {"budget": 40, "sink": 3, "recent": 12, "window": 12, "pool": 3, "interval": 17}
QUICK, LONG = ("dense", "snapkv", "streaming"), ("keydiff", "expected_attention", "rkv", "h2o", "pyramidkv")
HEAD, MORE, NOISE = random_prompts(11, (75, 400, 300))
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
SETTINGS = dict(max_num_seqs=2, enable_prefix_caching=True, num_decode_steps=2)
BELOW = dict(host_kv_bytes=1 << 24)


def policy(name: str, codec: str = "dense") -> dict:
    return {"preset": codec} if name == "dense" else {"preset": name, **SMALL}


def turns(engine, name: dict, new: tuple[int, ...] = (19, 1, 40), between=lambda: None, **last) -> list:
    """Outputs of the turns of a conversation in which so many tokens follow each answer."""
    keep = dataclasses.replace(GREEDY, keep_alive=100.0)
    talk = HEAD
    outputs = [engine.generate(talk, dataclasses.replace(keep, sparsity=name))[0]]
    for number, count in enumerate(new):
        between()
        talk = talk + outputs[-1].outputs[0].token_ids + MORE[number * 40 : number * 40 + count]
        params = dataclasses.replace(keep, conversation=outputs[-1].conversation)
        if number == len(new) - 1:
            params = dataclasses.replace(params, keep_alive=None, **last)
        outputs += engine.generate(talk, params)
    return outputs


def uninterrupted(engine, name: dict, output):
    """The answer to all that was said, where the policy compresses the first turn alone."""
    whole = {"prompt_token_ids": output.prompt_token_ids, "compress_at": len(HEAD)}
    return engine.generate(whole, dataclasses.replace(GREEDY, sparsity=name))[0]


def bits(output) -> tuple:
    (choice,) = output.outputs
    return choice.token_ids, [[entry.logprob for entry in step.values()] for step in choice.logprobs]


def move_below(engine) -> None:
    """What the engine keeps of conversations leaves the device, where there is something below it."""
    while engine.core.tiers and engine.core.scheduler.conversations.give_way():
        pass


def check_turns(engine, names: tuple[str, ...], codec: str = "dense") -> None:
    page = engine.config.page_size
    for name in names:
        its = policy(name, codec)
        outputs = turns(engine, its)
        for number, output in enumerate(outputs[1:]):
            wanted = uninterrupted(engine, its, output)
            assert bits(output)[0] == bits(wanted)[0], (name, number)
            for got, right in zip(bits(output)[1], bits(wanted)[1], strict=True):
                assert got == pytest.approx(right, abs=2e-3 if codec == "dense" else 0.2)
            said = len(outputs[number].prompt_token_ids) + 12
            recomputed = said - output.num_cached_tokens
            assert recomputed == 1 or (name == "dense" != codec and recomputed <= page)

        def others():
            move_below(engine)
            engine.generate([NOISE[:90], NOISE[90:200]], dataclasses.replace(GREEDY, sparsity=policy("snapkv", codec)))

        # The same bits, also where other sequences have had its row since.
        assert [bits(output) for output in turns(engine, its, between=others)] == [bits(output) for output in outputs]
    assert engine.stats()["kv_live_pages"] == engine.stats()["num_conversations"] == 0


@pytest.fixture(scope="module")
def engine():
    with warm_greedy(tiny_engine(sparsity=[*map(policy, QUICK)], **SETTINGS, **BELOW)) as engine:
        yield engine
        assert engine.stats()["compiles_after_warmup"] == 0


def test_a_continuation_is_the_uninterrupted_sequence(engine):
    check_turns(engine, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_a_continuation_is_the_uninterrupted_sequence_under_every_eviction(name):
    below = BELOW if name in ("keydiff", "rkv") else {}
    with warm_greedy(tiny_engine(sparsity=["dense", policy(name), policy("snapkv")], **SETTINGS, **below)) as engine:
        check_turns(engine, (name,))
        assert engine.stats()["compiles_after_warmup"] == 0


@pytest.mark.slow
def test_a_continuation_of_latents(tmp_path_factory):
    """Their full pages are kept, centers among them; the open one is computed again."""
    sparsity = stored_as("deltakv", tmp_path_factory)
    with tiny_engine(sparsity=sparsity, **SETTINGS, **BELOW) as engine:
        outputs = turns(engine, None)
        assert list(map(bits, turns(engine, None, between=lambda: move_below(engine)))) == list(map(bits, outputs))
        assert engine.stats()["conversations_lowered"] == 3 and engine.stats()["conversations_dropped"] == 0
        said = [len(output.prompt_token_ids) + 12 for output in outputs]
        for before, output in zip(said, outputs[1:], strict=False):
            assert output.num_cached_tokens == (before - 1) // 16 * 16
            assert bits(output)[0] == bits(engine.generate(output.prompt_token_ids, GREEDY)[0])[0]


@pytest.mark.parametrize("codec", ("int8", pytest.param("int4", marks=pytest.mark.slow)))
def test_a_continuation_of_coded_pages(codec):
    declared = [policy(name, codec) for name in ("dense", "snapkv", "streaming")]
    with warm_greedy(tiny_engine(sparsity=declared, **SETTINGS, **BELOW)) as engine:
        check_turns(engine, ("dense", "snapkv", "streaming"), codec)
        assert engine.stats()["conversations_lowered"] >= 6 and engine.stats()["conversations_dropped"] == 0
        assert engine.stats()["compiles_after_warmup"] == 0


@pytest.mark.parametrize("name", QUICK)
def test_an_answer_of_one_token_and_a_stop(engine, name):
    """The eviction is due and has not run; a step that was on its way computed more than was said."""
    its = policy(name)
    keep = dataclasses.replace(GREEDY, keep_alive=100.0)
    for params in (dict(max_tokens=1), dict(stop_token_ids=bits(turns(engine, its)[0])[0][2:5])):
        (first,) = engine.generate(HEAD, dataclasses.replace(keep, sparsity=its, **params))
        talk = HEAD + first.outputs[0].token_ids + MORE[:30]
        (second,) = engine.generate(talk, dataclasses.replace(GREEDY, conversation=first.conversation))
        assert second.num_cached_tokens == len(HEAD) + len(first.outputs[0].token_ids) - 1
        assert bits(second)[0] == bits(uninterrupted(engine, its, second))[0]


def test_an_aborted_turn_can_be_asked_again(engine):
    for name in QUICK:
        wanted = [bits(output) for output in turns(engine, policy(name), (19,))]
        keep = dataclasses.replace(GREEDY, keep_alive=100.0)
        (first,) = engine.generate(HEAD, dataclasses.replace(keep, sparsity=policy(name)))
        talk = HEAD + first.outputs[0].token_ids + MORE[:19]
        params = dataclasses.replace(GREEDY, conversation=first.conversation)
        for steps in (0, 1, 2, 9):
            engine.add_request("aborted", talk, dataclasses.replace(params, max_tokens=60))
            with pytest.raises(ConversationError, match="wait for its end"):
                engine.generate(talk, params)
            for _ in range(steps):
                engine.step()
            engine.abort("aborted")
        assert bits(engine.generate(talk, params)[0]) == wanted[1]


@contextlib.contextmanager
def room(engine, pages: int):
    """All but so many pages of the pool are taken."""
    allocator = engine.core.scheduler.allocator
    taken = allocator.allocate(allocator.num_free - pages)
    try:
        yield
    finally:
        while engine.has_unfinished():
            engine.step()
        allocator.release(taken)


@pytest.mark.parametrize("name", QUICK)
def test_memory_pressure_takes_kept_pages_first_and_brings_them_back(engine, name):
    before, wanted = engine.stats(), list(map(bits, turns(engine, policy(name), (19,))))

    def crowd():
        engine.generate([NOISE[:200], NOISE[60:260]], dataclasses.replace(GREEDY, max_tokens=60))

    with room(engine, 34):
        assert list(map(bits, turns(engine, policy(name), (19,), between=crowd))) == wanted
    after = engine.stats()
    assert after["num_preemptions"] == before["num_preemptions"]
    assert after["conversations_lowered"] == before["conversations_lowered"] + 1
    assert after["conversations_dropped"] == before["conversations_dropped"]


@pytest.mark.parametrize("name", QUICK)
def test_a_continuation_that_is_preempted(engine, name):
    wanted, names = [bits(output)[0] for output in turns(engine, policy(name))], itertools.count()

    def crowd():
        engine.add_request(f"{next(names)}", NOISE[:200], dataclasses.replace(GREEDY, max_tokens=100), priority=-1)

    before = engine.stats()["num_preemptions"]
    with room(engine, 22):
        assert [bits(output)[0] for output in turns(engine, policy(name), between=crowd)] == wanted
    assert engine.stats()["num_preemptions"] > before


def test_what_is_kept_is_counted_and_expires(engine):
    clock, conversations = [0.0], engine.core.scheduler.conversations
    conversations.clock, real = lambda: clock[0], conversations.clock
    try:
        params = dataclasses.replace(GREEDY, keep_alive=5.0, sparsity=policy("streaming"))
        (first,) = engine.generate(HEAD, params)
        stats, memory = engine.stats(), engine.memory()
        assert stats["num_conversations"] == 1 and stats["kv_kept_pages"] == stats["kv_live_pages"] + 1 > 1
        assert memory["conversation_rows"] > 0
        assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
        clock[0] = 5.1
        with pytest.raises(ConversationError, match="keep_alive"):
            engine.generate([*HEAD, 1], dataclasses.replace(GREEDY, conversation=first.conversation))
        engine.generate([1, 2], GREEDY)
        assert engine.stats()["kv_live_pages"] == engine.memory()["conversation_rows"] == 0
    finally:
        conversations.clock = real


def test_one_turn_of_a_call_and_a_cap_that_is_a_number(engine):
    params = dataclasses.replace(GREEDY, keep_alive=5.0)
    (first,) = engine.generate(HEAD, params)
    talk = HEAD + first.outputs[0].token_ids
    with pytest.raises(RequestError, match="One turn"):
        engine.generate([[*talk, 1], [*talk, 2]], dataclasses.replace(GREEDY, conversation=first.conversation))
    assert not engine.has_unfinished()
    engine.generate(talk, dataclasses.replace(GREEDY, conversation=first.conversation))
    with pytest.raises(ConfigError, match="conversation_pages=-1"):
        EngineConfig(conversation_pages=-1)


def test_a_chat_goes_on_as_text():
    """Tokens of an answer need not be those that its text is read as."""
    with text_engine(warmup="none") as engine:
        talk = [{"role": "user", "content": " box: 204;\nWhat is the value of box?"}]
        params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True, keep_alive=60.0)
        (first,) = engine.chat(talk, params)
        answer = first.outputs[0].text
        prompt = first.prompt + engine.tokenizer.decode(first.outputs[0].token_ids) + "\nQ: And of lamp?\nA:"
        more = dataclasses.replace(params, keep_alive=None, conversation=first.conversation)
        (second,) = engine.generate(prompt, more)
        said = first.prompt_token_ids + first.outputs[0].token_ids
        assert second.prompt_token_ids[: len(said)] == said and second.num_cached_tokens == len(said) - 1
        assert engine.tokenizer.decode(second.prompt_token_ids).endswith("And of lamp?\nA:") and answer
