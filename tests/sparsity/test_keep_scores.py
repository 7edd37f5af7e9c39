"""Each keep against the paper's formula in NumPy, on random and adversarial caches of one row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.cache.group import dense_group
from sparsejax.cache.paged import PagedKV
from sparsejax.sparsity.eviction import Keep
from sparsejax.sparsity.evictor import Evictor, best_slots
from tests.sparsity import keep_oracle as oracle
from tests.sparsity.keep_cases import DIM, LAYERS, METHODS, ROW, ROWS, P, evict, model, rows_with


@jax.jit
def store(seen, at, queries):
    return tuple(
        dataclasses.replace(one, queries=one.queries.at[at].set(q)) for one, q in zip(seen, queries, strict=True)
    )


class Cut:
    """A row of random tokens, cut by one keep; every page that is not its own holds NaN."""

    def __init__(
        self, keep: Keep, length: int, heads: int = 4, kv_heads: int = 2, seed: int = 0, platform: str = "cpu"
    ):
        rng = np.random.default_rng(seed)
        self.config, self.keep, self.length = model(heads, kv_heads), keep, length
        self.eviction = keep.eviction(length)
        self.keys, self.values = rng.normal(size=(2, LAYERS, length, kv_heads, DIM)).astype(np.float32)
        self.queries = rng.normal(size=(LAYERS, length, heads, DIM)).astype(np.float32)
        group = dense_group(self.config, P, np.dtype("float32"), 24, platform)
        pages = -(-length // P)
        self.page_ids = rng.permutation(np.arange(1, 24))[: pages + 6]
        self.page_ids, self.new = self.page_ids[:pages], self.page_ids[pages:]
        keeps = tuple(dataclasses.replace(keep, method=method) for method in METHODS)
        self.evictor = Evictor.of(keeps, self.config, P, length)
        layout = group.layout
        pools = []
        for layer in range(LAYERS):
            made = jax.tree.map(lambda pool: jnp.full_like(pool, jnp.nan), layout.zeros())
            ids = jnp.asarray(self.page_ids[np.arange(length) // P], jnp.int32)
            offsets = jnp.arange(length, dtype=jnp.int32) % P
            k, v = jnp.asarray(self.keys[layer]), jnp.asarray(self.values[layer])
            pools.append(layout.write(made, k, v, ids, offsets))
        nothing = (None,) * LAYERS
        self.mass = rng.random((LAYERS, 24, kv_heads, P)).astype(np.float32)
        observed = tuple(
            dataclasses.replace(self.evictor.nothing_seen(ROWS, layout), mass=jnp.asarray(mass)) for mass in self.mass
        )
        self.kv = PagedKV(tuple(pools), nothing, nothing, observed, group, self.config.windows)
        self.rows = rows_with(keep, self.eviction, METHODS.index(keep.method))
        if self.evictor.num_observed:
            self.observe(length)

    def observe(self, chunk: int) -> None:
        """Stores the queries chunk by chunk, as steps do."""
        size = self.evictor.num_observed
        for start in range(0, self.length, chunk):
            positions = np.arange(start, min(start + chunk, self.length))
            rows, live = jnp.full(len(positions), ROW), jnp.full(len(positions), True)
            at = self.rows.slots(rows, jnp.asarray(positions), live, size)
            seen = store(self.kv.observed, at, [jnp.asarray(q[positions]) for q in self.queries])
            self.kv = dataclasses.replace(self.kv, observed=seen)

    def run(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer, keys and values [K, kept, D] that are left."""
        (kept,) = self.eviction.kept
        new = np.zeros(self.evictor.capacity, np.int32)
        new[: -(-kept // P)] = self.new[: -(-kept // P)]
        table = np.full(20, 23, np.int32)
        table[: len(self.page_ids)] = self.page_ids
        row, at, length, most = jnp.int32(ROW), jnp.int32(self.length), jnp.array([self.length]), jnp.array([kept])
        pages = jnp.asarray(table)[None], length, most, at, jnp.asarray(new)[None]
        kv = evict(self.evictor, self.kv, self.rows, row, *pages)
        left = []
        self.left_mass = [np.asarray(seen.mass)[new].swapaxes(0, 1).reshape(-1, new.size * P) for seen in kv.observed]
        for k_pool, v_pool in kv.pools:
            if v_pool is None:
                k_pool, v_pool = k_pool[..., :DIM], k_pool[..., DIM : 2 * DIM]
            pages = (np.asarray(pool[..., :DIM])[new].swapaxes(0, 1) for pool in (k_pool, v_pool))
            left.append(tuple(p.reshape(p.shape[0], -1, DIM)[:, :kept] for p in pages))
        return left

    def scores(self, layer: int) -> np.ndarray:
        """By the oracle."""
        keys, values, queries = (x[layer].astype(np.float64) for x in (self.keys, self.values, self.queries))
        theta, positions = self.config.rope.theta, np.arange(self.length)
        last = oracle.rotate(queries, positions, theta)[-self.keep.window :]
        spread = queries[:: -(-self.length // self.keep.window)]
        heads, drawn = keys.shape[1], jax.random.fold_in(jax.random.key(0), self.length)
        return {
            "snapkv": lambda: oracle.window_attention(last, keys, self.keep.pool),
            "rkv": lambda: oracle.redundancy_aware(last, keys, self.keep.pool),
            "keydiff": lambda: -oracle.likeness(keys),
            "expected_attention": lambda: oracle.expected_attention(spread, keys, values, self.length, theta),
            "h2o": lambda: self.own_mass(layer),
            "streaming": lambda: np.tile(positions, (heads, 1)).astype(float),
            "random": lambda: np.tile(jax.random.uniform(drawn, (20 * P,))[: self.length], (heads, 1)),
        }[self.keep.method]()

    def own_mass(self, layer: int) -> np.ndarray:
        """What was counted of the row's tokens [K, n]."""
        return self.mass[layer][self.page_ids].swapaxes(0, 1).reshape(self.mass.shape[2], -1)[:, : self.length]


def check(cut: Cut) -> None:
    recent = max(cut.keep.recent, cut.keep.window if cut.keep.observes == "last" else 0)
    for layer, (keys, values) in enumerate(cut.run()):
        wanted = oracle.best(cut.scores(layer), *cut.eviction.kept, cut.keep.sink, recent)
        for head, slots in enumerate(wanted):
            np.testing.assert_array_equal(keys[head], cut.keys[layer][slots, head])
            np.testing.assert_array_equal(values[head], cut.values[layer][slots, head])
            kept = len(slots)
            np.testing.assert_array_equal(cut.left_mass[layer][head, :kept], cut.own_mass(layer)[head, slots])
            assert {*range(cut.keep.sink), *range(cut.length - recent, cut.length)} <= {*slots.tolist()}


@pytest.mark.parametrize(
    "length,budget,heads,kv_heads",
    [(150, 50, 4, 2), (96, 48, 2, 2), (161, 64, 6, 1), (47, 35, 4, 4)],
    ids=["gqa", "mha_whole_pages", "mqa_one_more", "almost_all"],
)
def test_tokens_that_stay_are_those_of_the_formula(length, budget, heads, kv_heads):
    for method in METHODS:
        keep = Keep(method, budget=budget, sink=3, recent=10, window=12, pool=5, interval=12)
        check(Cut(keep, length, heads, kv_heads, seed=length))


CORNERS = [(16, 15), (150, 1), (33, 32)]


@pytest.mark.parametrize("length,budget", CORNERS, ids=["one_page", "empty_middle", "one_leaves"])
def test_little_is_kept_as_the_formula_says(length, budget):
    for method in METHODS:
        check(Cut(Keep(method, budget=budget, sink=3, recent=10, window=12, pool=5, interval=12), length, seed=budget))


def test_pools_of_a_tpu_are_cut_alike():
    for method in METHODS:
        check(Cut(Keep(method, budget=48, recent=16, window=16, interval=16), 130, platform="tpu"))


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("method", ["snapkv", "expected_attention"])
def test_observed_queries_do_not_depend_on_chunks(method, chunk):
    keep = Keep(method, budget=40, recent=16, window=20)
    whole, parts = Cut(keep, 150), Cut(keep, 150)
    empty = jax.tree.map(lambda queries: jnp.full_like(queries, jnp.nan), parts.kv.observed)
    parts.kv = dataclasses.replace(parts.kv, observed=empty)
    parts.observe(chunk)
    positions = np.asarray(parts.rows.positions(jnp.int32(ROW), jnp.int32(150), parts.evictor.num_observed))
    for one, other, queries in zip(parts.kv.observed, whole.kv.observed, whole.queries, strict=True):
        for index, position in enumerate(positions):
            if position >= 0 and index < keep.window:
                np.testing.assert_array_equal(one.queries[ROW, index], queries[position])
                np.testing.assert_array_equal(one.queries[ROW, index], other.queries[ROW, index])


def test_an_eviction_during_decode_sees_the_queries_before_it():
    keep = Keep("rkv", budget=32, recent=8, window=8, interval=24)
    eviction = keep.eviction(10)
    assert (eviction.at, eviction.kept, eviction.interval) == (56, (32,), 24)
    rows = rows_with(keep, eviction)
    stored: dict[int, int] = {}
    for position in range(200):
        row, index = (int(x[0]) for x in rows.slots(jnp.array([ROW]), jnp.array([position]), jnp.array([True]), 8))
        if row == ROW:
            stored[index] = position
        if position + 1 in (56, 80, 104, 176):
            wanted = list(range(position + 1 - 8, position + 1))
            assert [stored[i] for i in range(8)] == wanted
            assert rows.positions(jnp.int32(ROW), jnp.int32(position + 1), 8).tolist() == wanted


def test_ties_sinks_and_recents():
    flat = jnp.zeros((2, 64))
    slots = best_slots(flat, *map(jnp.int32, (50, 10, 2, 3)), 16)
    wanted = [0, 1, 2, 3, 4, 5, 6, 47, 48, 49] + [64] * 6
    assert slots.tolist() == [wanted, wanted]
    high = flat.at[0, 60].set(9.0).at[0, 20].set(1.0).at[1, 30].set(-1.0)
    first, second = best_slots(high, *map(jnp.int32, (50, 10, 2, 3)), 16).tolist()
    assert first == [0, 1, 2, 3, 4, 5, 20, 47, 48, 49] + [64] * 6, "slots past the row must never be chosen"
    assert second == wanted
