"""Attention of one row in XLA: a loop over blocks of its listed pages with an online softmax.

The loop bounds are data, so the work follows the row's own page count, its causal limit and its window.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import layouts

HIDDEN = -1e30
# Tokens of a block: large ones for speed, small ones for the rest of a row. Measured on two cores without other
# load (H 12, K 4, D 64, bfloat16, ms per layer) for 512 and 64, 256 and 64, 256 and 32, 128 and 32:
# 16 decode rows of 600 tokens 3.5, 4.0, 1.8, 2.1; a chunk of 496 tokens at 1000 11.3, 7.5, 8.1, 7.3.
LARGE, SMALL = 128, 32


type Carry = tuple[Array, Array, Array]
"""Running maximum [K, M], sum [K, M] and weighted values [K, M, D] of the online softmax."""


@dataclasses.dataclass(frozen=True)
class Pages:
    """One layer's pools, the page lists of all rows and the options of attention over them."""

    k_pages: Array
    v_pages: Array | None
    page_ids: Array
    counts: Array
    logical_ids: Array | None
    scale: float
    window: int | None
    soft_cap: float | None

    @classmethod
    def of(
        cls,
        k_pages: Array,
        v_pages: Array | None,
        page_ids: Array,
        counts: Array,
        logical_ids: Array | None,
        **options: Any,
    ) -> Pages:
        """Pads the lists to whole small blocks, so that a block never has to be shifted to fit."""
        padding = ((0, 0), (0, 0), (0, -page_ids.shape[2] % _block(SMALL, k_pages)))
        if logical_ids is not None:
            logical_ids = jnp.pad(logical_ids, padding)
        return cls(k_pages, v_pages, jnp.pad(page_ids, padding), counts, logical_ids, **options)


def _block(tokens: int, pool: Array) -> int:
    """Pages of a block of about so many tokens."""
    return max(1, tokens // pool.shape[2])


def attend(
    q: Array, positions: Array, row: Array, pages: Pages, sinks: Array | None = None
) -> tuple[Array, Array]:
    """Attention of M queries per KV head of one row.

    q [K, M, D]; `positions` [M] of the queries, ascending from the first, -1 for padding; `row` scalar;
    `sinks` [K, M]. Returns (out [K, M, D] float32, log-sum-exp [K, M] float32); zeros and HIDDEN where
    nothing is seen.
    """
    kv_heads, queries, head_dim = q.shape
    page_size = pages.k_pages.shape[2]
    # A float32 product of few queries beats one in bfloat16 on CPU: 7.5 against 8.7 ms per layer for 4 rows
    # of 16384 tokens (H 12, K 4, D 64), and the bfloat16 product of a single query takes a path ten times
    # slower still.
    dtype = jnp.float32 if queries <= 16 else pages.k_pages.dtype
    q = q.astype(dtype)
    count = pages.counts[row]  # [Kl]
    newest, oldest = positions.max(), positions[0]
    bound = None if pages.window is None else oldest - pages.window + 1
    first, last = _page_range(pages, row, count, newest, bound)
    head = jnp.arange(kv_heads)[:, None]
    keys, values = layouts.columns(pages.k_pages, pages.v_pages, head_dim)

    def tokens(pool: Array, columns: slice, ids: Array) -> Array:
        # Gathering (page, head) tiles leaves each head's tokens contiguous: no transpose before the
        # products. Columns are cut from the tiles: cut from the pool, they would copy it.
        tiles = pool.at[ids, head].get(mode="promise_in_bounds")[..., columns]
        return tiles.reshape(kv_heads, -1, head_dim).astype(dtype)

    def score(ids: Array) -> Array:
        scores = _batched("kmd,ksd->kms", q, tokens(*keys, ids)) * pages.scale
        return scores if pages.soft_cap is None else pages.soft_cap * jnp.tanh(scores / pages.soft_cap)

    def add(carry: Carry, scores: Array, mixed: Array) -> Carry:
        top, total, acc = carry
        higher = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - higher[..., None])
        decay = jnp.exp(top - higher)
        mixed = _batched("kms,ksd->kmd", weights.astype(dtype), mixed)
        return higher, total * decay + weights.sum(-1), acc * decay[..., None] + mixed

    def whole(size: int, i: Array, carry: Carry) -> Carry:
        """A block that every query sees to its last token: nothing to mask."""
        ids = _entries(pages.page_ids, row, i * size + jnp.arange(size))
        return add(carry, score(ids), tokens(*values, ids))

    def masked(size: int, start: Array, i: Array, carry: Carry) -> Carry:
        entry = start + i * size + jnp.arange(size)
        listed = entry < count[:, None]  # [Kl, size]
        ids = jnp.where(listed, _entries(pages.page_ids, row, entry), 0)
        logical = entry if pages.logical_ids is None else _entries(pages.logical_ids, row, entry)
        slot = logical[..., None] * page_size + jnp.arange(page_size)
        slot = jnp.where(listed[..., None], slot, newest + 1).reshape(count.shape[0], -1)  # [Kl, size * P]
        live = slot <= newest
        seen = slot[:, None] <= positions[:, None]  # [Kl, M, size * P]
        if pages.window is not None:
            live &= slot >= bound
            seen &= slot[:, None] > positions[:, None] - pages.window
        values_seen = jnp.where(live[..., None], tokens(*values, ids), 0)  # zero times NaN would be NaN
        return add(carry, jnp.where(seen, score(ids), HIDDEN), values_seen)

    large, small = _block(LARGE, pages.k_pages), _block(SMALL, pages.k_pages)
    # Above HIDDEN, so that the weight of a hidden score is zero even before anything was seen.
    carry = jnp.full((kv_heads, queries), HIDDEN / 2), jnp.zeros((kv_heads, queries)), jnp.zeros(q.shape)
    start, larges = first // small * small, 0
    if large <= pages.page_ids.shape[2]:
        if pages.window is None and pages.logical_ids is None:
            larges = jnp.minimum(count.min(), (oldest + 1) // page_size) // large
            carry = lax.fori_loop(0, larges, functools.partial(whole, large), carry)
        else:
            larges = jnp.maximum(last - start, 0) // large
            carry = lax.fori_loop(0, larges, functools.partial(masked, large, start), carry)
    start += larges * large
    smalls = (jnp.maximum(last - start, 0) + small - 1) // small
    top, total, acc = lax.fori_loop(0, smalls, functools.partial(masked, small, start), carry)
    return _finish(top, jnp.where(positions < 0, 0, total), acc, sinks)


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
    page_size = pages.k_pages.shape[2]
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


def _entries(lists: Array, row: Array, entry: Array) -> Array:
    """The consecutive entries `entry` of the row's lists, [Kl, len(entry)]."""
    start = (row, jnp.zeros_like(row), entry[0])
    return lax.dynamic_slice(lists, start, (1, lists.shape[1], entry.shape[0]))[0]


def _batched(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
