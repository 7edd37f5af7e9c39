"""The same request gives the same tokens however it is batched, chunked, paged, preempted or delivered."""

from __future__ import annotations

import asyncio

import pytest

from sparsejax import SamplingParams
from sparsejax.engine.async_engine import AsyncEngine
from sparsejax.engine.request import RequestOutputKind
from tests.engine.models import random_prompts, tiny_engine, tiny_model

LENGTHS = (1, 5, 17, 40, 100, 33)
PROMPTS = random_prompts(0, LENGTHS)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=5, max_tokens=24, ignore_eos=True, n=2)


def tokens(outputs):
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def engine():
    with tiny_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(engine):
    """Each request alone."""
    return {params: [tokens(engine.generate(prompt, params))[0] for prompt in PROMPTS] for params in (GREEDY, SEEDED)}


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_batch_equals_alone(engine, wanted, params):
    assert tokens(engine.generate(PROMPTS, params)) == wanted[params]
    assert tokens(engine.generate(PROMPTS[::-1], params)) == wanted[params][::-1]


@pytest.mark.parametrize(
    "settings",
    [
        dict(max_num_batched_tokens=16, page_size=32),
        dict(max_num_batched_tokens=512, page_size=64),
        dict(max_num_seqs=3, max_num_batched_tokens=20, num_decode_steps=5),
    ],
    ids=str,
)
def test_settings_do_not_change_tokens(wanted, settings):
    with tiny_engine(**settings) as engine:
        assert tokens(engine.generate(PROMPTS, GREEDY)) == wanted[GREEDY]
        if "page_size" not in settings:
            assert tokens(engine.generate(PROMPTS, SEEDED)) == wanted[SEEDED]


def test_preempted_equals_uninterrupted(engine, wanted):
    allocator = engine.core.scheduler.allocator
    taken = allocator.allocate(allocator.num_free - 11)  # eleven pages are left
    prompts = [prompt[:14] for prompt in PROMPTS]
    alone = {params: [tokens(engine.generate(prompt, params))[0] for prompt in prompts] for params in wanted}
    for params in wanted:
        before = engine.stats()["num_preemptions"]
        assert tokens(engine.generate([*prompts, PROMPTS[4]], params)) == [*alone[params], wanted[params][4]]
        assert engine.stats()["num_preemptions"] > before
    allocator.release(taken)
    assert engine.stats()["kv_live_pages"] == 0


def test_streaming_equals_not_streaming(engine, wanted):
    for prompt, alone in zip(PROMPTS, wanted[GREEDY], strict=True):
        got: list[int] = []
        for delta in engine.stream(prompt, GREEDY):
            for choice in delta.outputs:
                got += choice.token_ids
        assert [got] == alone
    assert engine.stats()["kv_live_pages"] == 0


def test_a_closed_stream_aborts_its_request(engine):
    stream = engine.stream(PROMPTS[3], GREEDY)
    next(stream)
    assert engine.stats()["kv_live_pages"] > 0
    stream.close()
    assert engine.stats()["kv_live_pages"] == 0
    assert not engine.has_unfinished()


def test_step_by_step_equals_generate_and_keeps_outputs_of_others(engine, wanted):
    cumulative = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    engine.add_request("mine", PROMPTS[4], cumulative)
    assert tokens(engine.generate(PROMPTS[:3], GREEDY)) == wanted[GREEDY][:3]
    last = None
    while engine.has_unfinished():
        for output in engine.step():
            assert output.request_id == "mine"
            last = output
    assert last.finished and tokens([last])[0] == wanted[GREEDY][4]


def test_async_equals_sync_and_cancelling_frees_pages(wanted, monkeypatch):
    monkeypatch.setattr("sparsejax.engine.async_engine.Engine", lambda *a, config, **kw: tiny_engine(**kw))

    async def run():
        async with AsyncEngine() as engine:

            async def one(prompt, params):
                async for output in engine.generate(prompt, params):
                    last = output
                return last

            async def cancelled(prompt):
                async for output in engine.generate(prompt, GREEDY):
                    if len(output.outputs[0].token_ids) > 3:
                        break

            both = [one(p, params) for params in (GREEDY, SEEDED) for p in PROMPTS]
            results = await asyncio.gather(*both, *(cancelled(p) for p in PROMPTS))
            outputs = results[: len(both)]
            while engine.stats()["kv_live_pages"]:
                await asyncio.sleep(0.01)
            with pytest.raises(Exception, match="vocabulary of 199"):
                await one([5000], GREEDY)
            return outputs

    outputs = asyncio.run(asyncio.wait_for(run(), 120))
    assert tokens(outputs) == wanted[GREEDY] + wanted[SEEDED]


def test_final_only_and_delta_and_cumulative_agree(engine):
    def run(kind):
        params = SamplingParams(temperature=0.8, seed=1, n=3, max_tokens=9, output_kind=kind, ignore_eos=True)
        engine.add_request("r", PROMPTS[2], params)
        seen = []
        while engine.has_unfinished():
            seen += engine.step()
        return seen

    (final,) = run(RequestOutputKind.FINAL_ONLY)
    cumulative = run(RequestOutputKind.CUMULATIVE)
    joined = [[] for _ in range(3)]
    for output in run(RequestOutputKind.DELTA):
        for choice in output.outputs:
            joined[choice.index] += choice.token_ids
    assert tokens([final]) == tokens(cumulative[-1:]) == [joined]
    assert [c.finish_reason for c in final.outputs] == ["length"] * 3


@pytest.mark.slow
def test_a_sliding_window_survives_chunks_and_preemption():
    model = tiny_model(window=20)
    results = []
    for settings in (dict(), dict(max_num_batched_tokens=16), dict(page_size=64)):
        with tiny_engine(model, **settings) as engine:
            results.append(tokens(engine.generate(PROMPTS, GREEDY)))
    assert results[0] == results[1] == results[2]


def test_logprobs_and_prompt_logprobs_do_not_depend_on_the_batch(engine):
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    together = engine.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
            assert token in entry and 2 <= len(entry) <= 3
        (alone,) = engine.generate(prompt, params)
        for ours, theirs in zip(output.prompt_logprobs[1:], alone.prompt_logprobs[1:], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(abs(ours[t].logprob - theirs[t].logprob) < 1e-4 for t in ours)
        # Continuing the prompt by its own greedy token: the prompt's readout agrees with the sampler's.
        (first, *_) = output.outputs[0].token_ids
        (longer,) = engine.generate(prompt + [first], params)
        assert abs(longer.prompt_logprobs[-1][first].logprob - output.outputs[0].logprobs[0][first].logprob) < 1e-4
