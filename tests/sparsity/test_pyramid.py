"""Budgets that fall with depth: cache groups with tables, pools and allocators of their own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.errors import ConfigError, RequestError
from sparsejax.sparsity.eviction import Keep, bands
from sparsejax.sparsity.policy import SparsityConfig
from tests.engine.in_place import assert_in_place
from tests.engine.models import random_prompts, tiny_engine

PROMPTS = random_prompts(6, (70, 150, 3, 230, 90))
SMALL = {"budget": 60, "sink": 3, "recent": 12, "window": 12, "pool": 3}
PYRAMID = {"preset": "pyramidkv", **SMALL, "beta": 8.0}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
FALLING = dataclasses.replace(GREEDY, sparsity=PYRAMID)
FLAT = dataclasses.replace(GREEDY, sparsity={"preset": "snapkv", **SMALL})
QUEST = dataclasses.replace(GREEDY, sparsity={"preset": "quest", "budget": 48, "recent": 16})


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 12, 33])
@pytest.mark.parametrize("budget,length", [(1024, 8000), (1024, 1100), (100, 101), (40, 9000), (0.2, 5000)])
def test_budgets_fall_with_depth_and_their_mean_is_the_budget(layers, budget, length):
    keep = Keep("snapkv", budget=budget, beta=20)
    classes = bands([keep, Keep("keydiff")], layers)
    assert sum(classes) == layers and len(classes) == min(layers, 4)
    kept = keep.eviction(length, classes).kept
    mean, pinned = keep.kept(length), keep.sink + max(keep.recent, keep.window)
    assert list(kept) == sorted(kept, reverse=True) and kept[-1] >= pinned and kept[0] <= length
    given = sum(count * tokens for count, tokens in zip(classes, kept, strict=True))
    assert mean * layers - (layers if kept[0] == length else classes[0]) < given <= mean * layers
    if layers > 3 and length > 2 * mean:
        free = mean - pinned
        assert kept[0] > pinned + free and kept[-1] < pinned + free / 2 or free < 8


def test_one_class_where_no_budget_falls():
    assert bands([Keep("snapkv"), Keep()], 32) == (32,)
    assert Keep("snapkv", budget=100).eviction(1000).kept == (100,)


@pytest.fixture(scope="module", params=["dense", pytest.param("int4", marks=pytest.mark.slow)])
def codec(request):
    return request.param


@pytest.fixture(scope="module")
def engine(codec):
    policies = (codec, PYRAMID, FLAT.sparsity, QUEST.sparsity)
    with tiny_engine(sparsity=policies, max_num_seqs=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    asked = {"all": GREEDY, "pyramid": FALLING, "flat": FLAT, "quest": QUEST}
    return {name: [tokens(engine.generate(p, params))[0] for p in PROMPTS] for name, params in asked.items()}


def test_a_budget_that_covers_the_sequence_changes_nothing(engine, alone):
    full = dataclasses.replace(GREEDY, sparsity={**PYRAMID, "budget": 300})
    assert tokens(engine.generate(PROMPTS, full)) == alone["all"]
    assert alone["pyramid"][2] == alone["all"][2]
    assert len({str(alone[name][3]) for name in alone}) == len(alone)


def test_with_equal_budgets_groups_give_what_one_group_gives(codec, alone):
    """The same policies on an engine whose layers share their tables."""
    with tiny_engine(sparsity=(codec, FLAT.sparsity), max_num_seqs=4) as other:
        assert len(other.core.scheduler.allocators) == 1
        assert tokens(other.generate(PROMPTS, FLAT)) == alone["flat"]
        assert tokens(other.generate(PROMPTS, GREEDY)) == alone["all"]
        with pytest.raises(RequestError, match="the same in every layer, not beta=8"):
            other.generate(PROMPTS[3], FALLING)


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(engine, alone):
    asked, before = {"all": GREEDY, "pyramid": FALLING, "flat": FLAT, "quest": QUEST}, engine.stats()["compiles"]
    requests = [(place, name) for place in range(len(PROMPTS)) for name in asked]
    outputs = engine.generate([PROMPTS[place] for place, _ in requests], [asked[name] for _, name in requests])
    assert tokens(outputs) == [alone[name][place] for place, name in requests]
    assert engine.stats()["compiles"] == before
    assert engine.stats()["kv_live_pages"] == 0


def test_preempted_equals_uninterrupted(engine, alone):
    growing, long = random_prompts(7, (9,) * 3), dataclasses.replace(GREEDY, max_tokens=90)
    wanted = tokens(engine.generate(growing, long))
    upper, deeper = engine.core.scheduler.allocators
    taken = [upper.allocate(upper.num_free - 24), deeper.allocate(deeper.num_free - 20)]
    try:
        before = engine.stats()["num_preemptions"]
        params = [long] * len(growing) + [FALLING] * len(PROMPTS)
        assert tokens(engine.generate([*growing, *PROMPTS], params)) == [*wanted, *alone["pyramid"]]
        assert engine.stats()["num_preemptions"] > before
    finally:
        upper.release(taken[0])
        deeper.release(taken[1])
    assert engine.stats()["kv_live_pages"] == 0


def test_each_group_holds_its_own_budget_and_the_counters_say_so(engine, alone):
    before = engine.stats()
    engine.add_request("r", PROMPTS[3], FALLING)
    eviction = engine.core._policies.eviction(FALLING, 230)
    upper, deeper = eviction.kept
    assert upper > 60 > deeper and upper + deeper == 120
    held = 0
    while engine.stats()["num_running"] or engine.stats()["num_waiting"]:
        engine.step()
        (sequence,) = engine.core.scheduler.running or [None]
        if sequence is not None and sequence.num_computed > 230:
            wanted = [-(-(sequence.num_computed - 230 + kept) // 16) for kept in eviction.kept]
            assert [len(pages) for pages in sequence.tables] == wanted
            assert [a.num_live for a in engine.core.scheduler.allocators] == wanted
    while engine.has_unfinished():
        engine.step()
    held = engine.stats()["decode_held_bytes"] - before["decode_held_bytes"]
    groups = engine.core.runner.state.kv.groups
    steps = range(1, GREEDY.max_tokens)
    tiles = sum(-(-(kept + step) // 16) * group.page_tiles for kept, group in zip(eviction.kept, groups, strict=True)
                for step in steps)  # fmt: skip
    assert held == groups[0].of_all(groups).read_bytes(tiles, len(steps))


def test_pools_are_updated_in_place(engine, alone):
    assert_in_place(engine)


def test_the_saving_is_real():
    """Where only falling budgets are declared, the deeper pools are smaller, and the same bytes hold more cut rows
    than pools of the largest class would."""
    with tiny_engine(sparsity=PYRAMID, max_num_seqs=16, kv_memory_bytes=900_000) as one:
        groups, allocators = one.core.runner.state.kv.groups, one.core.scheduler.allocators
        upper, deeper = (group.layout.num_pages for group in groups)
        assert upper > deeper > 33  # a whole prompt of 512 tokens fits both
        assert one.memory()["kv_pages"] == sum(group.pool_bytes for group in groups) <= 900_000
        sizes = [[pool.shape[0] for pool in jax.tree.leaves(pools)] for pools in one.core.runner.state.kv.pools]
        assert sizes == [[upper] * 2, [deeper] * 2]
        kept = one.core._policies.eviction(FALLING, 500).kept
        rows = min((a.capacity - 32) // (-(-tokens // 16) + 1) for a, tokens in zip(allocators, kept, strict=True))
        largest = -(-kept[0] // 16) + 1
        equal = (900_000 // groups[0].of_all(groups).page_bytes - 33) // largest
        assert rows > equal


def test_refusals_say_what_to_do():
    with pytest.raises(ConfigError, match="beta=0.5 must be a number of at least 1"):
        SparsityConfig.preset("pyramidkv", beta=0.5)
    with pytest.raises(ConfigError, match="pages go there through the prefix cache"):
        tiny_engine(sparsity=PYRAMID, host_kv_bytes=1 << 20, enable_prefix_caching=True)
    with pytest.raises(ConfigError, match="lists of pages pass from layer to layer"):
        SparsityConfig(keep=Keep("snapkv", beta=4), select="omnikv", filter_layers=(0,))


def held(engine, params: SamplingParams) -> list[np.ndarray]:
    """Keys [K, tokens, D] of each layer, as attention reads them, right after a prompt was cut."""
    engine.add_request("r", PROMPTS[3], params)
    while not engine.core.scheduler.running or engine.core.scheduler.running[0].num_computed <= 230:
        engine.step()
    (sequence,), kv = engine.core.scheduler.running, engine.core.runner.state.kv
    found = []
    for layer in range(len(kv.pools)):
        group = kv.group_of(layer)
        length = sequence.eviction.kept[group]
        table = jnp.asarray(sequence.tables[group], jnp.int32)
        (keys, _), pages = kv.plain_pages(layer, jnp.int32(sequence.row), table, jnp.int32(length))
        found.append(np.asarray(keys)[np.asarray(pages)].swapaxes(0, 1).reshape(2, -1, 16)[:, :length])
    engine.abort("r")
    while engine.has_unfinished():
        engine.step()
    return found


def test_a_layer_keeps_what_it_keeps_where_every_layer_has_its_budget(engine, alone):
    upper, deeper = engine.core._policies.eviction(FALLING, 230).kept
    flat = [dataclasses.replace(GREEDY, sparsity={**FLAT.sparsity, "budget": budget}) for budget in (upper, deeper)]
    falling = held(engine, FALLING)
    assert [keys.shape[1] for keys in falling] == [upper, deeper]
    for layer, params in enumerate(flat):
        np.testing.assert_array_equal(falling[layer], held(engine, params)[layer])
