"""Selections against plain NumPy oracles of each paper's formula, on random and adversarial inputs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from sparsejax.sparsity.choice import choose
from sparsejax.sparsity.kinds import Select
from sparsejax.sparsity.policy import SparsityConfig, selects_of
from sparsejax.sparsity.rows import PolicyRows, pack_policy
from sparsejax.sparsity.select import Query
from tests.sparsity import select_oracle

ROWS, HEADS, KV_HEADS, DIM, SIZE, PAGES = 3, 4, 2, 8, 4, 10
WIDTH = 8


def longest_key(query, policy):
    """A user's own score: the largest absolute bound of a page."""
    return jnp.abs(query.bounds).max(-1)[query.page_ids[:, 0]].swapaxes(1, 2)


OWN = Select.scored(longest_key, bounds=True)
TOKENS = dict(sink=4, recent=5)  # in pages of 4 tokens one sink, and recents in two
POLICIES = {
    "window": SparsityConfig(select="window", budget=20, **TOKENS),
    "strided": SparsityConfig(select="strided", stride=3, budget=32, **TOKENS),
    "strided to fit": SparsityConfig(select="strided", budget=20, **TOKENS),
    "random": SparsityConfig(select="random", seed=5, budget=20, **TOKENS),
    "oracle": SparsityConfig(select="oracle", budget=20, **TOKENS),
    "oracle top_p": SparsityConfig(select="oracle", budget=32, top_p=0.6, **TOKENS),
    "quest": SparsityConfig(select="quest", budget=20, **TOKENS),
    "quest top_p": SparsityConfig(select="quest", budget=32, top_p=0.8, **TOKENS),
    "quest interval": SparsityConfig(select="quest", budget=28, interval=6, **TOKENS),
    "omnikv": SparsityConfig(select="omnikv", filter_layers=(0,), budget=20, **TOKENS),
    "turbo": SparsityConfig(select="quest", filter_layers=(0,), budget=20, **TOKENS),
    "own": SparsityConfig(select=OWN, budget=20, **TOKENS),
}
SELECTS = selects_of(tuple(POLICIES.values()))


@functools.partial(jax.jit, static_argnames="heads")
def run(q, keys, page_ids, lengths, policy, heads):
    """The lists of `choose` over pages that hold `keys`, with bounds and log-sum-exps as the engine has them."""
    counts = -(-lengths // SIZE)[:, None]
    every = jnp.arange(keys.shape[0], dtype=jnp.int32)
    bounds = pallas_kernels.page_bounds(jnp.zeros((*keys.shape[:2], 2 * DIM)), keys, every)
    options = dict(window=None, soft_cap=None, implementation=None)
    _, lse = pallas_kernels.paged_decode_attention(q, keys, keys, page_ids, counts, lengths, return_lse=True)
    query = Query(q, keys, keys, bounds, page_ids, counts, lengths, options, lse)
    return choose(query, policy, jnp.ones(ROWS, bool), SELECTS, heads, WIDTH)


def expected(config: SparsityConfig, q, keys, length: int) -> list[list[int]]:
    """The lists of one row per KV head; `keys` [S, K, P, D] are those of its own pages."""
    pages = config.page_counts(PAGES * SIZE, SIZE)
    count = -(-length // SIZE)
    place = np.arange(PAGES, dtype=float)
    middle = slice(pages.sinks, max(count - pages.recents, pages.sinks))
    name = config.kind.name
    if name == "window":
        scores = place[None]
    elif name == "strided":
        scores = np.where(place % pages.stride == 0, place, -np.inf)[None]
    elif name == "random":
        scores = np.asarray(jax.random.uniform(jax.random.key(config.seed), (1, PAGES)))
    elif name == "longest_key":
        scores = np.abs(keys).max((2, 3)).T
    elif name == "quest":
        scores = select_oracle.quest_bounds(q, keys)
        if config.shared or config.top_p < 1:
            shares = np.zeros_like(scores)
            shares[:, middle] = select_oracle.softmax(scores[:, middle])
            scores = shares.max(0, keepdims=True) if config.shared else shares
    else:
        probability = select_oracle.probabilities(q, keys, length)
        by_head = probability.reshape(KV_HEADS, -1, PAGES)
        scores = by_head.sum(1) if name == "oracle" else probability.max(0)[None]
    budget = pages.budget - pages.growth
    lists = [select_oracle.best(row, count, budget, pages.sinks, pages.recents, config.top_p) for row in scores]
    return lists * (KV_HEADS // len(lists))


def check(name: str, seed: int, lengths, dull: bool) -> None:
    rng = np.random.default_rng(seed)
    config = POLICIES[name]
    q = rng.standard_normal((ROWS, HEADS, DIM)).astype(np.float32)
    keys = rng.standard_normal((ROWS * PAGES + 1, KV_HEADS, SIZE, DIM)).astype(np.float32)
    if dull:  # every page looks like some other: scores tie
        q, keys = np.ones_like(q), np.broadcast_to(np.round(keys[:, :1, :1, :1]), keys.shape).copy()
    page_ids = rng.permutation(np.arange(1, ROWS * PAGES + 1)).reshape(ROWS, 1, PAGES).astype(np.int32)
    row = pack_policy(config, PAGES * SIZE, SIZE, SELECTS, 1)
    policy = PolicyRows(**{key: np.broadcast_to(value, (ROWS, *value.shape)) for key, value in row.items()})
    heads = 1 if config.shared else KV_HEADS
    chosen = run(q, keys, page_ids, np.asarray(lengths, np.int32), policy, heads)
    for b, length in enumerate(lengths):
        mine = keys[page_ids[b, 0]].astype(np.float64)
        wanted = expected(config, q[b].astype(np.float64), mine, length)
        for head in range(heads):
            got = np.asarray(chosen.ids[b, head, : chosen.counts[b, head]]).tolist()
            assert got == wanted[head], (length, head)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lengths=st.tuples(*(st.integers(1, PAGES * SIZE) for _ in range(ROWS))))
def test_choice_is_the_formula(name, seed, lengths):
    check(name, seed, lengths, dull=False)


@pytest.mark.parametrize("name", [name for name in POLICIES if "top_p" not in name])
@pytest.mark.parametrize("seed", range(3))
def test_of_equal_scores_the_earlier_page_is_read(name, seed):
    check(name, seed, (PAGES * SIZE, 33, 29), dull=True)


@pytest.mark.parametrize("name", POLICIES)
def test_one_page_and_an_empty_middle(name):
    check(name, 0, (1, SIZE, 3 * SIZE), dull=False)


def test_fewer_pages_reach_a_smaller_share():
    rng = np.random.default_rng(2)
    q = 4 * rng.standard_normal((ROWS, HEADS, DIM)).astype(np.float32)
    keys = rng.standard_normal((ROWS * PAGES + 1, KV_HEADS, SIZE, DIM)).astype(np.float32)
    page_ids = np.arange(1, ROWS * PAGES + 1, dtype=np.int32).reshape(ROWS, 1, PAGES)
    shares = (0.2, 0.7, 1.0)
    packed = [
        pack_policy(SparsityConfig(select="oracle", budget=32, top_p=p, **TOKENS), 40, SIZE, SELECTS, 1) for p in shares
    ]
    policy = PolicyRows(**{key: np.stack([row[key] for row in packed]) for key in packed[0]})
    q[:] = q[0]
    page_ids[:] = page_ids[0]
    counts = np.asarray(run(q, keys, page_ids, np.full(ROWS, PAGES * SIZE, np.int32), policy, KV_HEADS).counts)
    assert (counts[0] < counts[1]).all() and (counts[1] < counts[2]).all() and (counts[2] == WIDTH).all()
