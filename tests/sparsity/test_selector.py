"""What a layer reads: lists that serve several steps and other layers, rows that fit, refusals of an engine."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from sparsejax.cache.layout import DenseLayout
from sparsejax.cache.paged import Rows, StepBatch
from sparsejax.cache.views import DensePages
from sparsejax.errors import ConfigError
from sparsejax.sparsity.lists import Lists
from sparsejax.sparsity.policy import ALL_PAGES, Role, SparsityConfig
from sparsejax.sparsity.rows import PolicyRows, pack_policy
from sparsejax.sparsity.selector import Handed, Selector
from tests.sparsity import select_oracle

HEADS, KV_HEADS, DIM, SIZE, PAGES, LAYERS = 4, 2, 8, 4, 26, 3
OPTIONS = dict(window=None, soft_cap=None, implementation=None)
KEYS = jnp.asarray(np.random.default_rng(3).standard_normal((PAGES + 1, KV_HEADS, SIZE, DIM)).astype(np.float32))
IDS = jnp.arange(1, PAGES + 1, dtype=jnp.int32)[None]


class Layers:
    """One row under one policy, layer after layer and step after step."""

    def __init__(self, **parameters):
        config = SparsityConfig(select="quest", sink=4, recent=5, **parameters)
        self.selector = Selector.of((config,), SIZE, KV_HEADS, PAGES * SIZE)
        row = pack_policy(config, PAGES * SIZE, SIZE, self.selector.selects, LAYERS)
        self.policy = PolicyRows(**{name: jnp.asarray(value[None]) for name, value in row.items()})
        layout = DenseLayout.plain(PAGES + 1, KV_HEADS, SIZE, DIM, np.dtype(np.float32))
        self.carried = [self.selector.initial_carried(1, layout) for _ in range(LAYERS)]
        every = jnp.arange(PAGES + 1, dtype=jnp.int32)
        self.bounds = jax.jit(pallas_kernels.page_bounds)(jnp.zeros((PAGES + 1, KV_HEADS, 2 * DIM)), KEYS, every)

    @functools.partial(jax.jit, static_argnums=0)
    def _read(self, layer, q, length, carried, handed):
        nothing = jnp.zeros(1, jnp.int32)
        batch = StepBatch(*[nothing] * 4, Rows(IDS, length), rows=nothing, policy=self.policy)
        return self.selector.read(layer, q, DensePages(KEYS, KEYS), self.bounds, batch, carried, handed, OPTIONS)

    def step(self, length: int, seed: int):
        """Outputs and lists of every layer for random queries of a row of `length` tokens."""
        rng, seen = np.random.default_rng(seed), []
        handed = Handed.first(Lists.empty(1, self.selector.heads, self.selector.width), LAYERS)
        for layer in range(LAYERS):
            q = 3 * rng.standard_normal((1, HEADS, DIM)).astype(np.float32)
            length_ = np.asarray([length], np.int32)
            out, self.carried[layer], handed = self._read(layer, q, length_, self.carried[layer], handed)
            lists = [handed.lists.ids[0, h, : handed.lists.counts[0, h]].tolist() for h in range(self.selector.heads)]
            seen.append((q, np.asarray(out[0]), lists))
        self.recall, self.capped = np.asarray(handed.recall[0]), np.asarray(handed.capped[0])
        return seen, np.asarray(handed.tiles[0])


def attention(q, pages, length) -> np.ndarray:
    """Attention of q [H, D] over the tokens of one list of pages per KV head."""
    groups, out = q.reshape(KV_HEADS, -1, DIM).astype(np.float64), []
    for head, mine in enumerate(pages):
        slots = (np.asarray(mine)[:, None] * SIZE + np.arange(SIZE)).ravel()
        values = np.asarray(KEYS[1:, head]).reshape(-1, DIM)[slots[slots < length]].astype(np.float64)
        weights = np.exp(groups[head] @ values.T / np.sqrt(DIM))
        out.append(weights / weights.sum(1, keepdims=True) @ values)
    return np.concatenate(out)


def blocks_oracle(q, length, block, wanted) -> list[list[int]]:
    """Pages per KV head that are left when only those of the best blocks are: sink in page 0, recents in the last 2."""
    count = -(-length // SIZE)
    pages = np.asarray(KEYS[1 : 1 + count]).swapaxes(0, 1)  # [K, S, P, D]
    left = []
    for head, keys in enumerate(pages):
        full = [range(start, start + block) for start in range(0, count - 2 - block + 1, block)]
        tiles = np.stack([keys[list(one)] for one in full])[None].swapaxes(0, 1)  # [M, 1, block, P, D]
        bounds = [select_oracle.quest_bounds(q.reshape(KV_HEADS, -1, DIM)[head], tile.reshape(1, 1, -1, DIM))
                  for tile in tiles]
        best = sorted(range(1, len(full)), key=lambda i: (-bounds[i].item(), i))[:wanted]
        chosen = {0, *best, *range(len(full), -(-count // block))}
        left.append([page for page in range(count) if page // block in chosen])
    return left


@pytest.mark.parametrize("interval", [1, 3])
def test_of_pages_in_the_best_blocks_the_best_are_read(interval):
    layers = Layers(budget=20, block=4, candidates=1, interval=interval)
    assert layers.selector.blocks == 1 + 1 + 2  # sinks, candidates, recents that may begin within a block
    for length in range(97, 105):
        seen, _ = layers.step(length, length)
        if interval > 1 and length % interval != 1 and length > 97:
            continue
        count = -(-length // SIZE)
        for q, _, lists in seen:
            scores = select_oracle.quest_bounds(q[0].astype(np.float64), np.asarray(KEYS[1:], np.float64))
            room = 5 if interval == 1 else 4
            for head, left in enumerate(blocks_oracle(q[0], length, 4, 1)):
                few = np.where(np.isin(np.arange(PAGES), left), scores[head], -np.inf)
                assert lists[head] == select_oracle.best(few, count, room, 1, 2, 1.0), (length, head)


def test_a_row_that_blocks_do_not_spare_half_of_the_scores_has_none():
    plain, blocks = Layers(budget=20), Layers(budget=20, block=4, candidates=1)
    for length in (44, 45, 60):  # 15 pages: 4 blocks and 4 candidates
        both = (one.step(length, length)[0] for one in (blocks, plain))
        for (_, ours, lists), (_, theirs, wanted) in zip(*both, strict=True):
            assert lists == wanted
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert all(int(carried.blocks.made.sum()) == 0 for carried in blocks.carried)


def test_an_engine_has_blocks_of_one_size():
    eight, four = (SparsityConfig(select="quest", budget=20, block=block) for block in (8, 4))
    with pytest.raises(ConfigError, match="names blocks of 4 and 8 pages"):
        Selector.of((eight, four), SIZE, KV_HEADS, 400)
    with pytest.raises(ConfigError, match="block=8: select='window' reads no bounds"):
        SparsityConfig(select="window", block=8)
    selector = Selector.of((eight,), SIZE, KV_HEADS, 400)
    assert "blocks of 8 pages (0 is none), not block=4" in selector.lacks(four, 100)
    more = dataclasses.replace(eight, candidates=9)
    assert f"candidates in at most {selector.blocks} blocks" in selector.lacks(more, 100)
    assert selector.lacks(dataclasses.replace(more, budget=400), 100) is None, "it reads everything"
    assert selector.lacks(eight, 100) is None and selector.lacks(dataclasses.replace(eight, block=0), 100) is None


def test_a_budget_that_covers_every_sequence_is_served_whatever_was_declared():
    small = SparsityConfig(select="quest", budget=20)
    selector = Selector.of((small,), SIZE, KV_HEADS, 400)
    assert selector.width == 18  # recents take what the budget does not hold
    assert selector.lacks(dataclasses.replace(small, budget=400), 100) is None
    assert "budgets of up to 18 pages" in selector.lacks(dataclasses.replace(small, budget=396), 100)


def test_lists_that_a_top_p_fills_are_counted():
    for top_p, budget in ((0.999, 16), (0.01, 32), (1.0, 16)):
        layers = Layers(budget=budget, top_p=top_p)
        seen, _ = layers.step(44, 44)
        full = sum(len(one) == budget // SIZE for _, _, lists in seen for one in lists)
        assert layers.capped.tolist() == ([0, 0] if top_p == 1 else [LAYERS * KV_HEADS, full])
        assert full == (0 if top_p == 0.01 else LAYERS * KV_HEADS)


@pytest.mark.parametrize("parameters", [{}, {"interval": 3}, {"filter_layers": (0, 2)}, {"dense_layers": 1}])
def test_a_layer_attends_to_the_lists_it_says(parameters):
    layers = Layers(budget=20, **parameters)
    for length in range(37, 44):
        seen, tiles = layers.step(length, length)
        count, read = -(-length // SIZE), 0
        for layer, (q, out, lists) in enumerate(seen):
            dense = layer < parameters.get("dense_layers", 0)
            pages = [range(count)] * KV_HEADS if dense else lists * (KV_HEADS // len(lists))
            np.testing.assert_allclose(out, attention(q[0], pages, length), atol=1e-5)
            read += sum(map(len, pages))
            if not dense:
                assert all(len(mine) <= 5 and {0, count - 2, count - 1} <= {*mine} for mine in pages)
        assert tiles.tolist() == [LAYERS * KV_HEADS * count, read]


def test_layers_after_a_filter_layer_reuse_its_list():
    seen, _ = Layers(budget=24, filter_layers=(0, 2)).step(41, 0)
    first, second, third = (lists for _, _, lists in seen)
    assert first == second != third and len(first) == 1
    own, _ = Layers(budget=24).step(41, 0)
    assert len({str(lists) for _, _, lists in own}) == LAYERS


def test_a_selection_serves_its_interval_and_takes_in_new_pages():
    layers, before = Layers(budget=28, interval=6), None
    refreshed = []
    for length in range(33, 46):
        seen, _ = layers.step(length, length)
        lists = seen[0][2]
        if before is not None:
            opened = [-(-length // SIZE) - 1] if (length - 1) % SIZE == 0 else []
            if lists != [mine + opened for mine in before]:
                refreshed.append(length - 1)
        before = lists
    assert refreshed == [36, 42]


def test_a_row_that_fits_reads_everything_and_keeps_no_list():
    layers = Layers(budget=44, interval=4)
    seen, tiles = layers.step(44, 1)
    for q, out, lists in seen:
        np.testing.assert_allclose(out, attention(q[0], [range(11)] * KV_HEADS, 44), atol=1e-5)
        assert lists == [[], []]
    assert tiles[0] == tiles[1] and all(int(carried.lists.counts.sum()) == 0 for carried in layers.carried)
    seen, _ = layers.step(45, 2)
    assert all(len(mine) == 10 for _, _, lists in seen for mine in lists)  # 11 pages less one for growth


def test_lists_grow_by_the_pages_that_opened():
    lists = Lists(jnp.asarray([[[0, 3, 5, 0, 0]], [[0, 0, 0, 0, 0]]]), jnp.asarray([[3], [0]]))
    grown = lists.grown(jnp.asarray([8, 8]))
    assert grown.counts.tolist() == [[5], [0]] and grown.ids[0, 0].tolist() == [0, 3, 5, 6, 7]


def test_recall_is_the_probability_of_what_is_read():
    layers = Layers(budget=24, recall_every=3)
    for length in range(38, 44):
        seen, _ = layers.step(length, length)
        if (length - 1) % 3:
            assert (layers.recall == -1).all()
            continue
        for (q, _, lists), recall in zip(seen, layers.recall, strict=True):
            keys = np.asarray(KEYS[1:], np.float64)
            mass = select_oracle.probabilities(q[0].astype(np.float64), keys, length).reshape(KV_HEADS, -1, PAGES)
            captured = np.mean([mass[head][:, mine].sum(-1) for head, mine in enumerate(lists)])
            np.testing.assert_allclose(recall, captured, atol=1e-5)
            assert recall < 0.999


def test_rows_that_capture_too_little_read_more_and_then_everything():
    config = SparsityConfig(select="quest", budget=16, sink=4, recent=4, recall_every=1, recall_floor=0.8)
    row = pack_policy(config, 48, SIZE, Selector.of((config,), SIZE, 2, 48).selects, 2)
    policy = PolicyRows(**{name: jnp.asarray(np.stack([value] * 4)) for name, value in row.items()})
    recall = jnp.asarray([[0.9, 0.5], [0.9, 0.8], [-1.0, -1.0], [-1.0, 0.1]])
    rows = jnp.arange(4)
    once, more = policy.guarded(rows, recall, 8)
    assert once.budget.tolist() == [8, 4, 4, 8] and more.tolist() == [[1, 0], [0, 0], [0, 0], [1, 0]]
    twice, more = once.guarded(rows, recall, 8)
    assert twice.budget.tolist() == [ALL_PAGES, 4, 4, ALL_PAGES] and more.tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]


def test_roles_of_layers():
    def roles(**parameters):
        return SparsityConfig(**parameters).layer_roles(4)

    read, select, reuse, both = Role.READ_ALL, Role.SELECT, Role.REUSE, Role.SELECT_READ_ALL
    assert roles() == (read,) * 4
    assert roles(select="quest", dense_layers=2) == (read, read, select, select)
    assert roles(select="quest", filter_layers=[1, 3]) == (read, select, reuse, select)
    assert roles(select="omnikv", filter_layers=(0, 2)) == (both, reuse, both, reuse)
    assert roles(select="omnikv", filter_layers="auto") == (both, both, both, reuse)
    assert roles(select="quest", filter_layers="auto", dense_layers=1) == (read, select, select, reuse)
    assert roles(select="quest", filter_layers=(3,), dense_layers=2) == (read, read, read, select)
    turbo = SparsityConfig.preset("turbo")
    assert [turbo.layer_roles(32).count(role) for role in (read, select, reuse)] == [2, 3, 27]
    assert turbo.settled((0, 1, 3)).layer_roles(6) == (read, read, select, select, reuse, reuse)
    assert turbo.layer_roles(2) == (read, read)
    with pytest.raises(ConfigError, match="layer 1 reads everything, so it cannot be in"):
        SparsityConfig(select="quest", filter_layers=(1, 3), dense_layers=2)
