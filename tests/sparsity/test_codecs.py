"""Codecs under every select: full budgets, mixes of policies, bounds of decoded keys, bytes, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import codes
from sparsejax import SamplingParams
from sparsejax.errors import ConfigError, RequestError
from sparsejax.sparsity.policy import SparsityConfig, declared
from tests.engine.in_place import assert_in_place
from tests.engine.models import random_prompts, tiny_engine, tiny_model, warm_greedy

PROMPTS = random_prompts(5, (3, 150, 40, 230, 90))
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=0)
TURBO = {"preset": "turbo", "dense_layers": 0, "interval": 4}  # two layers are all that there are
SELECTS = ("window", "quest", "oracle", TURBO)


def asking(select: str | dict, **parameters) -> SamplingParams:
    preset = {"preset": select} if isinstance(select, str) else select
    return dataclasses.replace(GREEDY, sparsity={**preset, "budget": 64, "sink": 16, "recent": 16, **parameters})


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def engine():
    # Long sequences, so that no temporary array has the shape of a pool.
    settings = dict(sparsity=("int4", *SELECTS), max_num_seqs=4, num_decode_steps=3)
    with tiny_engine(tiny_model(positions=4096), **settings) as engine:
        yield warm_greedy(engine)


@pytest.fixture(scope="module")
def everything(engine):
    return tokens(engine.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("select", SELECTS, ids=str)
def test_a_budget_that_covers_the_sequence_reads_everything(engine, everything, select):
    assert tokens(engine.generate(PROMPTS, asking(select, budget=512))) == everything


def test_every_policy_gives_in_a_mixed_batch_what_it_gives_alone(engine, everything):
    requests = [(prompt, params) for params in (GREEDY, *map(asking, SELECTS)) for prompt in PROMPTS]
    alone = [tokens(engine.generate(prompt, params))[0] for prompt, params in requests]
    before = engine.stats()["compiles"]
    together = tokens(engine.generate([prompt for prompt, _ in requests], [params for _, params in requests]))
    assert together == alone
    assert together[: len(PROMPTS)] == everything
    assert engine.stats()["compiles"] == before
    assert len({tuple(together[i * len(PROMPTS) + 3]) for i in range(5)}) > 2, "policies must differ on a long prompt"


def chunks_and_batches_change_nothing(engine, **other) -> None:
    """Alone in `engine`, and together in one with chunks of 12 tokens; a covering budget reads everything."""
    selects, prompts = ("quest", TURBO), PROMPTS[2:4]
    ways = [(select, budget) for select in selects for budget in (64, 512)]
    requests = [(prompt, asking(select, budget=budget)) for select, budget in ways for prompt in prompts]
    alone = [tokens(engine.generate(prompt, params))[0] for prompt, params in requests]
    everything = tokens(engine.generate(prompts, GREEDY))
    with tiny_engine(max_num_seqs=4, max_num_batched_tokens=16, **other) as narrow:
        assert tokens(narrow.generate(*map(list, zip(*requests, strict=True)))) == alone
    for place, (_, budget) in enumerate(ways):
        assert (alone[2 * place : 2 * place + 2] == everything) == (budget == 512)


def test_chunks_and_batches_change_nothing(engine):
    chunks_and_batches_change_nothing(engine, model=tiny_model(positions=4096), sparsity=("int4", "quest", TURBO))


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_chunks_and_batches_change_nothing_in_other_codes(codec):
    sparsity = (codec, "quest", TURBO)
    with tiny_engine(sparsity=sparsity, max_num_seqs=4) as engine:
        chunks_and_batches_change_nothing(engine, sparsity=sparsity)


def test_pools_and_bounds_are_updated_in_place(engine):
    assert_in_place(engine)


def test_bounds_hold_for_what_attention_reads(engine, everything):
    """Of every page that was ever sealed, in every layer: no decoded key lies outside its bounds by more than the
    last bit, in which two programs may differ."""
    kv = engine.core.runner.state.kv
    for ((k_codes, _, scales), _), bounds in zip(kv.pools, kv.bounds, strict=True):
        keys = np.asarray(codes.keys(k_codes, scales, 16))
        sealed = np.asarray(scales).any((1, 2))
        low, high = np.split(np.asarray(bounds), 2, axis=-1)
        assert sealed.sum() > 20
        least, largest, bit = keys[sealed].min(2), keys[sealed].max(2), 1e-6 * np.abs(keys[sealed]).max(2)
        assert (low[sealed] <= least + bit).all() and (high[sealed] >= largest - bit).all()
        assert (low[sealed] < high[sealed]).all()


def test_bytes_read_are_the_sealed_pages_selected_and_the_open_page(engine):
    group = engine.core.runner.state.kv.group
    for params, pages in ((asking("quest"), 4), (asking("window", budget=96), 6)):
        before = engine.stats()["decode_read_bytes"]
        engine.generate(PROMPTS[3], params)
        read = engine.stats()["decode_read_bytes"] - before
        assert read == (GREEDY.max_tokens - 1) * ((pages - 1) * group.page_bytes + group.row_bytes)


def test_live_bytes_count_the_open_pages(engine):
    group = engine.core.runner.state.kv.group
    engine.add_request("r", PROMPTS[2], GREEDY)
    engine.step()
    assert engine.stats()["kv_live_bytes"] == 3 * group.page_bytes + group.row_bytes
    engine.abort("r")
    assert engine.stats()["kv_live_bytes"] == 0


def test_policies_of_an_engine_share_one_codec():
    assert {policy.codec for policy in declared(("int8", "quest", {"preset": "window", "codec": "int8"}))} == {"int8"}
    assert {policy.codec for policy in declared(("quest", "window"))} == {"dense"}
    assert {policy.codec for policy in declared(("snapkv", "int4"))} == {"int4"}
    assert {policy.codec for policy in declared(("quest", "turbo"))} == {"int4"}
    assert {policy.codec for policy in declared(("turbo", "fp8"))} == {"fp8"}, "a preset's own codec gives way"
    firm = {"preset": "turbo", "codec": "int4"}
    for mixed in (("dense", "int8"), ("int8", firm), ({"preset": "quest", "codec": "fp8"}, "int8")):
        with pytest.raises(ConfigError, match="stores all pages in one"):
            declared(mixed)
    with pytest.raises(ConfigError, match="'int3' is not one of 'dense', 'int8'"):
        SparsityConfig(codec="int3")


@pytest.mark.parametrize("bad", ["dense", "fp8", {"preset": "quest", "codec": "fp8"}])
def test_a_request_cannot_choose_another_codec(engine, bad):
    with pytest.raises(RequestError, match="this engine stores its pages as int") as caught:
        engine.generate([1, 2], SamplingParams(sparsity=bad))
    assert caught.value.parameter == "sparsity"
    with pytest.raises(RequestError, match="no eviction, not by snapkv"):
        engine.generate([1, 2], SamplingParams(sparsity="snapkv"))
    own = engine.core.runner.state.kv.group.layout.sealed.codec
    engine.generate([1, 2], dataclasses.replace(GREEDY, sparsity={"preset": "quest", "codec": own}))
