"""Each select in the engine: exact at full budget, the oracle's choice, mixes of policies, bytes read."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.errors import ConfigError, RequestError
from sparsejax.sparsity.kinds import Select
from sparsejax.sparsity.policy import SparsityConfig
from tests.engine.in_place import assert_in_place
from tests.engine.models import random_prompts, tiny_engine, warm_greedy

PROMPTS = random_prompts(5, (3, 310, 40, 230, 90))
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=0)


def longest_key(query, policy):
    """A user's own score: the largest absolute bound of a page."""
    return jnp.abs(query.bounds).max(-1)[query.page_ids[:, 0]].swapaxes(1, 2)


OWN = SparsityConfig(select=Select.scored(longest_key, bounds=True))
POLICIES = {
    **{name: SparsityConfig.preset(name) for name in ("dense", "window", "random", "oracle", "quest")},
    "strided": SparsityConfig(select="strided", stride=2),
    "quest, top_p": SparsityConfig(select="quest", top_p=0.3),
    "quest, interval": SparsityConfig(select="quest", interval=3),
    "quest, blocks": SparsityConfig(select="quest", block=4, candidates=1),
    "quest, dense layer": SparsityConfig(select="quest", dense_layers=1),
    "omnikv": SparsityConfig(select="omnikv", filter_layers=(0,)),
    "turbo": SparsityConfig(select="quest", filter_layers=(0,), interval=4),
    "own": OWN,
}


def asking(name: str, budget: int = 64) -> SamplingParams:
    policy = dataclasses.replace(POLICIES[name], budget=budget, sink=16, recent=16)
    return dataclasses.replace(GREEDY, sparsity=policy)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def engine():
    settings = dict(max_num_seqs=4, max_num_batched_tokens=32, num_decode_steps=2)
    with tiny_engine(sparsity=tuple(POLICIES.values()), **settings) as engine:
        yield warm_greedy(engine)


@pytest.fixture(scope="module")
def alone(engine):
    """Tokens of every prompt under every policy, one at a time."""
    return {
        (name, place): tokens(engine.generate(prompt, asking(name)))[0]
        for name in POLICIES
        for place, prompt in enumerate(PROMPTS)
    }


@pytest.fixture(scope="module")
def dense():
    with tiny_engine() as engine:
        yield engine.generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_that_covers_the_sequence_is_dense(engine, dense, name):
    for ours, theirs in zip(engine.generate(PROMPTS, asking(name, budget=512)), dense, strict=True):
        (ours,), (theirs,) = ours.outputs, theirs.outputs
        assert ours.token_ids == theirs.token_ids
        ours, theirs = (
            [entry[token].logprob for token, entry in zip(out.token_ids, out.logprobs, strict=True)]
            for out in (ours, theirs)
        )
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_every_policy_gives_in_any_batch_what_it_gives_alone(engine, alone):
    rng, before = np.random.default_rng(0), engine.stats()["compiles"]
    for _ in range(12):
        mix = [(list(POLICIES)[rng.integers(len(POLICIES))], rng.integers(len(PROMPTS))) for _ in range(9)]
        params = [asking(name) for name, _ in mix]
        together = tokens(engine.generate([PROMPTS[place] for _, place in mix], params))
        assert together == [alone[key] for key in mix]
    assert engine.stats()["compiles"] == before
    longest = PROMPTS.index(max(PROMPTS, key=len))
    answers = {tuple(alone[name, longest]) for name in POLICIES}
    assert len(answers) > len(POLICIES) // 2, "policies must differ where the budget does not cover the sequence"


def test_bounds_of_full_pages_are_those_of_their_keys():
    with tiny_engine(sparsity="quest", max_num_batched_tokens=24) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(f"r{index}", prompt, dataclasses.replace(GREEDY, max_tokens=40))
        for _ in range(35):
            engine.step()
        kv, checked = engine.core.runner.state.kv, 0
        for sequence in engine.core.scheduler.running:
            pages = np.array(sequence.pages[: (sequence.num_computed - 1) // 16])
            checked += len(pages)
            for (keys, _), bounds in zip(kv.pools, kv.bounds, strict=True):
                low, high = np.split(np.asarray(bounds)[pages], 2, axis=-1)
                np.testing.assert_array_equal(low, np.asarray(keys)[pages].min(2))
                np.testing.assert_array_equal(high, np.asarray(keys)[pages].max(2))
        assert checked > 20


def test_pools_and_bounds_are_updated_in_place(engine):
    assert_in_place(engine)


@pytest.mark.parametrize("name", ["random", "quest"])
def test_an_engine_whose_default_is_sparse(alone, name):
    with tiny_engine(sparsity={"preset": name, "budget": 64, "sink": 16, "recent": 16}) as other:
        wanted = [alone[name, place] for place in range(len(PROMPTS))]
        assert tokens(other.generate(PROMPTS, GREEDY)) == wanted
        memory = other.memory()
        assert bool(memory["page_bounds"]) == (name == "quest")
        assert memory["total"] == sum(size for part, size in memory.items() if part != "total")


def test_bytes_read_are_the_budget(engine):
    def read(params):
        before = engine.stats()
        engine.generate(PROMPTS[3], params)
        after = engine.stats()
        return [after[key] - before[key] for key in ("decode_read_bytes", "decode_held_bytes")]

    read_dense, held_dense = read(asking("dense"))
    assert read_dense == held_dense > 0
    read_sparse, held_sparse = read(asking("quest"))
    assert held_sparse == held_dense
    decode_steps = GREEDY.max_tokens - 1
    budget = decode_steps * 4 * engine.stats()["kv_page_bytes"]
    assert read_sparse == budget
    assert read(asking("quest, dense layer"))[0] == (budget + held_dense) // 2
    assert read(asking("omnikv"))[0] == (budget + held_dense) // 2


GUARDED = {
    "quest": {"select": "quest"},
    "turbo": {"select": "quest", "filter_layers": (0,), "codec": "int4"},
    "omnikv": {"select": "omnikv", "filter_layers": (0,), "codec": "int4"},
}


@pytest.mark.parametrize("name", GUARDED)
def test_a_row_under_its_recall_floor_reads_everything_in_the_end(name):
    asked = SparsityConfig(**GUARDED[name], budget=32, sink=16, recent=1, recall_every=1, recall_floor=1.0)
    params = dataclasses.replace(GREEDY, sparsity=asked)
    with tiny_engine(sparsity=dataclasses.replace(asked, budget=128)) as engine:
        engine.generate(PROMPTS[3], params)
        stats = engine.stats()
        assert (stats["budgets_widened"], stats["budgets_dropped"]) == (3, 1)  # 2 pages to 4, 8 and everything
        assert stats["recall_checks"] == 3
        measured = [layer for layer in range(2) if f"recall_layer_{layer}" in stats]
        assert measured == ([1] if name == "omnikv" else [0, 1])  # its filter layer reads everything
        assert all(0 < stats[f"recall_layer_{layer}"] < 1 for layer in measured)
        held = [-(-(231 + step) // 16) for step in range(GREEDY.max_tokens - 1)]
        read = [2, 4, 8, *held[3:]]
        other = held if name == "omnikv" else read
        assert stats["decode_pages_held"] == sum(held) and stats["decode_pages_read"] == (sum(read) + sum(other)) / 2
        group = engine.core.runner.state.kv.group
        tiles = round(stats["decode_pages_read"] * group.page_tiles)
        assert stats["decode_read_bytes"] == group.read_bytes(tiles, len(held))
        again = dataclasses.replace(params, sparsity=dataclasses.replace(asked, recall_floor=0.0))
        engine.generate(PROMPTS[3], again)
        assert engine.stats()["decode_pages_read"] - stats["decode_pages_read"] < stats["decode_pages_read"] / 1.5


def test_undeclared_and_unknown_policies_are_refused():
    with tiny_engine(sparsity="window") as engine:
        for bad, message in (("quest", "serves the selects all, window, not 'quest'"), ("qest", "did you mean")):
            with pytest.raises(RequestError, match=message) as caught:
                engine.generate([1, 2], SamplingParams(sparsity=bad))
            assert caught.value.parameter == "sparsity"
        engine.generate([1, 2], dataclasses.replace(GREEDY, sparsity="dense"))
    for bad in (dict(budget=0), dict(budget=1.5), dict(sink=-1), dict(budgt=3), dict(recent=1.0)):
        with pytest.raises(ConfigError):
            SparsityConfig.preset("quest", **bad)
    for bad in (3, (), {"budget": 4}, "queste"):
        with pytest.raises(ConfigError):
            tiny_engine(sparsity=bad)


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("recent", [0, 1, 15, 16, 17, 64])
def test_recent_tokens_are_in_the_recent_pages(page_size, recent):
    pages = SparsityConfig(select="window", budget=1, recent=recent).page_counts(1000, page_size)
    for length in range(recent + 1, recent + 3 * page_size):
        listed = -(-length // page_size)
        first_read = (listed - pages.recents) * page_size
        assert first_read <= length - recent
        assert pages.budget >= pages.sinks + pages.recents
