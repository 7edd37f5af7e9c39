"""Engines whose sealed pages are coded: equal to the plain rule, whatever the batch, the chunks or the pool."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.cache.group import dense_group, make_group
from tests.cache.sealed_reference import SealedReference, next_logprobs
from tests.engine.in_place import assert_in_place
from tests.engine.models import random_prompts, tiny_engine, tiny_model

CODECS = ("int8", "fp8", "int4")
PROMPTS = random_prompts(0, (1, 5, 17, 40, 100, 33, 64))
FOUR = dict(max_num_seqs=4)
"""One size of the decode section, so half as many programs."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0)
SEEDED = SamplingParams(temperature=0.9, seed=5, max_tokens=24, ignore_eos=True, n=3, logprobs=0)


def answers(outputs):
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


def logprobs(choice) -> list[float]:
    return [entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)]


def assert_close(ours, theirs) -> None:
    """Close log-probabilities. A value between two codes may fall to either of them, and all tokens after it see that:
    the last bits of two programs differ, and a step between codes of 4 bits is a sixteenth of the value."""
    apart = np.abs(np.asarray(ours) - np.asarray(theirs))
    assert np.median(apart) < 1e-4
    assert apart.max() < 5e-2


def assert_same(ours, theirs) -> None:
    """The same tokens with close log-probabilities."""
    assert answers(ours) == answers(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert_close(logprobs(a), logprobs(b))


def assert_follows_the_rule(outputs, model, codec: str) -> None:
    """The tokens that the plain rule gives, one prompt after the other."""
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (choice,) = output.outputs
        kv = SealedReference(codec, 16, model.config.windows)
        rule = next_logprobs(model, kv, prompt + choice.token_ids)[len(prompt) - 1 : -1]
        assert rule.argmax(-1).tolist() == choice.token_ids
        assert_close(logprobs(choice), rule.max(-1))


@pytest.fixture(scope="module")
def engine():
    with tiny_engine(sparsity="int4", **FOUR) as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(engine):
    """Each request alone."""
    return {params.n: [engine.generate(prompt, params)[0] for prompt in PROMPTS] for params in (GREEDY, SEEDED)}


MODELS = {"gqa": dict(), "mha": dict(kv_heads=4), "window": dict(window=20)}
QUICK = {("mha", "int4"), ("window", "fp8")}


@pytest.mark.parametrize(
    "model,codec",
    [
        pytest.param(model, codec, marks=() if (name, codec) in QUICK else pytest.mark.slow, id=f"{name}-{codec}")
        for name, model in MODELS.items()
        for codec in CODECS
    ],
)
def test_tokens_are_those_of_the_plain_rule(model, codec):
    model = tiny_model(**model)
    with tiny_engine(model, sparsity=codec, **FOUR) as engine:
        assert_follows_the_rule(engine.generate(PROMPTS, GREEDY), model, codec)


def test_what_others_are_compared_with_follows_the_plain_rule(wanted):
    assert_follows_the_rule(wanted[1], tiny_model(), "int4")


def test_codes_change_what_is_read(wanted):
    """The codec is in use: beyond the first page, log-probabilities are not those of dense pages."""
    with tiny_engine(**FOUR) as dense:
        theirs = dense.generate(PROMPTS[4], GREEDY)
    (ours,) = wanted[1][4].outputs
    assert abs(logprobs(ours)[0] - logprobs(theirs[0].outputs[0])[0]) > 1e-3


def test_batch_equals_alone(engine, wanted):
    for params in (GREEDY, SEEDED):
        assert_same(engine.generate(PROMPTS, params), wanted[params.n])
        assert_same(engine.generate(PROMPTS[::-1], params), wanted[params.n][::-1])
    assert engine.stats()["kv_live_pages"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(dict(max_num_batched_tokens=16), marks=pytest.mark.slow),
        dict(max_num_seqs=3, max_num_batched_tokens=20, num_decode_steps=5),
    ],
    ids=str,
)
def test_chunks_and_decode_steps_change_nothing(wanted, settings):
    with tiny_engine(sparsity="int4", **settings) as engine:
        assert_same(engine.generate(PROMPTS, GREEDY), wanted[1])
        assert_same(engine.generate(PROMPTS, SEEDED), wanted[3])


def test_preempted_equals_uninterrupted(engine, wanted):
    allocator = engine.core.scheduler.allocator
    taken = allocator.allocate(allocator.num_free - 11)  # eleven pages are left
    for params in (GREEDY, SEEDED):
        before = engine.stats()["num_preemptions"]
        assert_same(engine.generate(PROMPTS, params), wanted[params.n])
        assert engine.stats()["num_preemptions"] > before
    allocator.release(taken)
    assert engine.stats()["kv_live_pages"] == 0


def test_samples_share_full_pages_and_are_never_copied(engine, wanted):
    runner, copies = engine.core.runner, []
    copy, runner._copy_pages = runner._copy_pages, lambda pairs: copies.extend(pairs)
    try:
        engine.add_request("r", PROMPTS[4], SEEDED)
        most = 0
        while engine.has_unfinished():
            engine.step()
            most = max(most, engine.stats()["kv_live_pages"])
    finally:
        runner._copy_pages = copy
    shared = len(PROMPTS[4]) // 16
    own = -(-(len(PROMPTS[4]) + SEEDED.max_tokens) // 16) - shared
    assert not copies
    assert most <= shared + SEEDED.n * own


def test_aborts_leave_no_trace(engine, wanted):
    for steps in (1, 2, 4, 7):
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(f"{i}", prompt, SEEDED if i % 2 else GREEDY)
        for _ in range(steps):
            engine.step()
        engine.abort([f"{i}" for i in range(0, len(PROMPTS), 2)])
        while engine.has_unfinished():
            engine.step()
    assert engine.stats()["kv_live_pages"] == 0
    assert_same(engine.generate(PROMPTS, GREEDY), wanted[1])


def test_what_no_sequence_holds_is_never_read(engine, wanted):
    """NaN in every scale, code pool of fp8 aside, and every open page leaves all answers as they are."""

    def poison(pool):
        if jnp.issubdtype(pool.dtype, jnp.floating):
            return jnp.full_like(pool, jnp.nan)
        return jnp.full_like(pool, 77)

    runner = engine.core.runner
    kv = dataclasses.replace(runner.state.kv, pools=jax.tree.map(poison, runner.state.kv.pools))
    runner.state = dataclasses.replace(runner.state, kv=kv)
    for params in (GREEDY, SEEDED):
        assert_same(engine.generate(PROMPTS, params), wanted[params.n])


@pytest.mark.parametrize(("codec", "stored"), [("int8", "int8"), ("fp8", "uint8")])
def test_pools_are_updated_in_place(codec, stored):
    """In two programs; the whole table is tested with int4. On a CPU fp8 lies as bytes."""
    with tiny_engine(tiny_model(positions=4096), sparsity=codec, warmup="lazy") as engine:
        assert engine.core.runner.state.kv.pools[0][0][0].dtype == stored
        assert_in_place(engine)


@pytest.mark.parametrize("codec", CODECS)
def test_memory_is_what_is_allocated_and_a_budget_buys_more_pages(codec):
    budget = 1 << 19
    with tiny_engine(sparsity=codec, kv_memory_bytes=budget) as engine, tiny_engine(kv_memory_bytes=budget) as dense:
        runner, memory = engine.core.runner, engine.memory()
        arrays = jax.tree.leaves((runner.state, runner.params))
        assert memory["total"] == sum(array.nbytes for array in arrays)
        assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
        group = runner.state.kv.group
        assert memory["kv_pages"] + memory["open_pages"] == group.pool_bytes
        assert group.pool_bytes <= budget
        pages, dense_pages = (e.core.scheduler.allocator.num_pages for e in (engine, dense))
        assert pages * group.page_bytes > budget - group.fixed_bytes - group.page_bytes
        assert pages > 2 * dense_pages


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_arrays(codec, dtype, platform):
    group = make_group(tiny_model().config, 32, jnp.dtype(dtype), 7, platform, codec=codec, num_rows=3)
    pools = [group.layout.zeros() for _ in group.layers]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pools)) == group.pool_bytes
    assert group.pool_bytes == 7 * group.page_bytes + group.fixed_bytes
    dense = dense_group(tiny_model().config, 32, jnp.dtype(dtype), 4, platform)
    assert group.fixed_bytes == dense.pool_bytes


@pytest.mark.parametrize(("codec", "share"), [("int8", 0.5234), ("fp8", 0.5234), ("int4", 0.2969)])
def test_share_of_a_dense_page_in_bfloat16(codec, share):
    """Head dim 64, pages of 32 tokens."""
    config = dataclasses.replace(tiny_model().config, head_dim=64)
    shape = (config, 32, jnp.dtype("bfloat16"), 2)
    coded = make_group(*shape, "cpu", codec=codec, num_rows=1).page_bytes
    assert coded / dense_group(*shape).page_bytes == pytest.approx(share, abs=1e-4)
