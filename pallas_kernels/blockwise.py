"""Attention of one row in XLA, and what else needs its scores: a loop over blocks of its listed pages.

The loop bounds are data, so the work follows the row's own page count, its causal limit and its window.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.groups import HIDDEN
from pallas_kernels.pages import FEW, LARGE, Pages, batched, block_of, ordered_sum


@dataclasses.dataclass(frozen=True)
class Queries:
    """M queries per KV head of one row.

    q [K, M, D]; `positions` [M], ascending, -1 for padding on either side; `row` scalar. A query sees slots up
    to its own position, or up to `last` [M], which is no later and ascends too. Of a tile of ragged tokens
    `anchor` is a position no later than the first: how its blocks are cut follows from that alone.
    """

    q: Array
    positions: Array
    row: Array
    last: Array | None = None
    anchor: Array | None = None


class Block(NamedTuple):
    """Consecutive entries of a row's lists and what its queries make of them."""

    start: Array  # the first entry
    size: int  # entries
    ids: Array  # [Kl, size], 0 where not listed
    scores: Array  # [K, M, size * P] float32, HIDDEN where not seen
    seen: Array  # [Kl, M, size * P]
    live: Array  # [Kl, size * P], slots that may be read


def over_blocks[Carry](
    queries: Queries, pages: Pages, body: Callable[[Block, Carry], Carry], carry: Carry
) -> Carry:
    """Runs `body` over the blocks of pages that some query of the row may see, in ascending order."""
    q, positions, row = queries.q.astype(pages.dtype(queries.q)), queries.positions, queries.row
    count = pages.counts[row]  # [Kl]
    last_seen = positions if queries.last is None else queries.last
    newest, oldest = last_seen.max(), positions[0] if queries.anchor is None else queries.anchor
    bound = None if pages.window is None else oldest - pages.window + 1
    first, last = _page_range(pages, row, count, newest, bound)

    def block(entry: Array, ids: Array, seen: Array, live: Array, carry: Carry) -> Carry:
        scores = batched("kmd,ksd->kms", q, pages.keys(ids, q)) * pages.scale
        if pages.soft_cap is not None:
            scores = pages.soft_cap * jnp.tanh(scores / pages.soft_cap)
        scores = jnp.where(seen, scores, HIDDEN)
        return body(Block(entry[0], len(entry), ids, scores, seen, live), carry)

    def whole(size: int, start: Array, i: Array, carry: Carry) -> Carry:
        """A block that every query sees to its last token: only padding is masked."""
        entry = start + i * size + jnp.arange(size)
        slots = (count.shape[0], size * pages.page_size)
        seen = jnp.broadcast_to((positions >= 0)[:, None], (slots[0], len(positions), slots[1]))
        return block(entry, _entries(pages.page_ids, row, entry), seen, jnp.ones(slots, bool), carry)

    def masked(size: int, start: Array, i: Array, carry: Carry) -> Carry:
        entry = start + i * size + jnp.arange(size)
        listed = entry < count[:, None]  # [Kl, size]
        ids = jnp.where(listed, _entries(pages.page_ids, row, entry), 0)
        logical = entry if pages.logical_ids is None else _entries(pages.logical_ids, row, entry)
        slot = logical[..., None] * pages.page_size + jnp.arange(pages.page_size)
        slot = jnp.where(listed[..., None], slot, newest + 1).reshape(count.shape[0], -1)  # [Kl, size * P]
        live = slot <= newest
        seen = slot[:, None] <= last_seen[:, None]  # [Kl, M, size * P]
        if pages.window is not None:
            live &= slot >= bound
            seen &= slot[:, None] > positions[:, None] - pages.window
        # Made once: fused into what reads the tiles, XLA works out the masks for every number of a tile.
        return block(entry, ids, *lax.optimization_barrier((seen, live)), carry)

    # A loop leaves what is partly seen, or too short for its blocks, to those that follow.
    plain = pages.window is None and pages.logical_ids is None
    common = last_seen[0] if queries.anchor is None else queries.anchor - 1  # what every query sees
    full = _wholly_seen(pages, row, count, common) if pages.window is None else None
    medium, small = (block_of(tokens, pages.page_size) for tokens in pages.blocks)
    stages = [(whole, medium, full) if plain else (masked, medium, last)]
    if pages.window is not None and queries.anchor is not None:
        stages = [(masked, medium, queries.anchor // pages.page_size)]
    if pages.window is None and q.shape[1] <= FEW:
        stages.insert(0, (whole, block_of(LARGE, pages.page_size), full))
    start = first // small * small
    for run, size, end in stages:
        if size <= pages.page_ids.shape[2]:
            blocks = jnp.maximum(end - start, 0) // size
            carry = lax.fori_loop(0, blocks, functools.partial(run, size, start), carry)
            start += blocks * size
    smalls = (jnp.maximum(last - start, 0) + small - 1) // small
    return lax.fori_loop(0, smalls, functools.partial(masked, small, start), carry)


def attend(queries: Queries, pages: Pages, sinks: Array | None = None) -> tuple[Array, Array]:
    """Attention of the queries of one row.

    `sinks` [K, M]. Returns (out [K, M, D] float32, log-sum-exp [K, M] float32); zeros and HIDDEN where
    nothing is seen.
    """

    def body(block: Block, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, acc = carry
        higher, decay, weights = _online(block, top)
        mixed = pages.mix(weights, block.ids, block.live, pages.dtype(queries.q), queries.q.shape[2])
        return higher, total * decay + ordered_sum(weights), acc * decay[..., None] + mixed

    carry = (*_nothing(queries), jnp.zeros(queries.q.shape))
    return _finish(*over_blocks(queries, pages, body, carry), sinks)


def log_sum_exp(queries: Queries, pages: Pages, sinks: Array | None = None) -> Array:
    """The log-sum-exp [K, M] of `attend` alone, without reading values."""

    def body(block: Block, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        higher, decay, weights = _online(block, carry[0])
        return higher, carry[1] * decay + ordered_sum(weights)

    top, total = over_blocks(queries, pages, body, _nothing(queries))
    return _finish(top, total, jnp.zeros((*top.shape, 0)), sinks)[1]


def _nothing(queries: Queries) -> tuple[Array, Array]:
    shape = queries.q.shape[:2]
    return jnp.full(shape, HIDDEN), jnp.zeros(shape)


def _online(block: Block, top: Array) -> tuple[Array, Array, Array]:
    """The new maximum, the decay of what was summed under the old one, and the weights of the block."""
    higher = jnp.maximum(top, block.scores.max(-1))
    weights = jnp.where(block.seen, jnp.exp(block.scores - higher[..., None]), 0)
    return higher, jnp.exp(top - higher), weights


def _finish(top: Array, total: Array, acc: Array, sinks: Array | None) -> tuple[Array, Array]:
    sees = total > 0
    if sinks is not None:
        higher = jnp.maximum(top, sinks)
        decay = jnp.exp(top - higher)
        top, total, acc = higher, total * decay + jnp.exp(sinks - higher), acc * decay[..., None]
    out = jnp.where(sees[..., None], acc / jnp.where(sees, total, 1)[..., None], 0)
    return out, jnp.where(sees, top + jnp.log(jnp.where(sees, total, 1)), HIDDEN)


def _page_range(
    pages: Pages, row: Array, count: Array, newest: Array, oldest: Array | None
) -> tuple[Array, Array]:
    """Bounds of the list entries that some query may see, over the lists of the row."""
    page_size = pages.page_size
    before = None if oldest is None else jnp.maximum(oldest, 0) // page_size
    if pages.logical_ids is None:
        last = jnp.minimum(count, newest // page_size + 1).max()
        return (jnp.zeros_like(last) if before is None else before), last
    logical = pages.logical_ids[row]
    listed = jnp.arange(logical.shape[1]) < count[:, None]
    last = (listed & (logical <= newest // page_size)).sum(-1).max()
    if before is None:
        return jnp.zeros_like(last), last
    return (listed & (logical < before)).sum(-1).min(), last


def _wholly_seen(pages: Pages, row: Array, count: Array, oldest: Array) -> Array:
    """How many first entries of every list of the row lie before the end of the page of `oldest`, or end with it."""
    before = (oldest + 1) // pages.page_size
    if pages.logical_ids is None:
        return jnp.minimum(count.min(), before)
    logical = pages.logical_ids[row]
    listed = jnp.arange(logical.shape[1]) < count[:, None]
    return (listed & (logical < before)).sum(-1).min()


def _entries(lists: Array, row: Array, entry: Array) -> Array:
    """The consecutive entries `entry` of the row's lists, [Kl, len(entry)]."""
    start = (row, jnp.zeros_like(row), entry[0])
    return lax.dynamic_slice(lists, start, (1, lists.shape[1], entry.shape[0]))[0]


def decode_rows(
    q: Array, pages: Pages, lengths: Array, sinks: Array | None
) -> tuple[Array, Array]:
    """Attention of one query per row: out [B, H, D] in the dtype of q and log-sum-exp [B, H]."""
    kv_heads, groups = pages.k_pages.shape[1], q.shape[1] // pages.k_pages.shape[1]
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, groups)

    def one_row(row: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        queries = Queries(q[row].reshape(kv_heads, groups, -1), jnp.full(groups, lengths[row] - 1), row)
        out, lse = attend(queries, pages, sinks)
        out = out.reshape(q.shape[1:]).astype(q.dtype)
        return results[0].at[row].set(out), results[1].at[row].set(lse.ravel())

    # Rows run in order: the products inside already keep the cores busy, so independent loops over parts of
    # the rows gained nothing (8.8 against 8.9 ms for 4 rows of 16384 tokens on two cores).
    return lax.fori_loop(0, q.shape[0], one_row, (jnp.zeros_like(q), jnp.zeros(q.shape[:2])))
