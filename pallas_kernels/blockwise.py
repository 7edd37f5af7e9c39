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
# Tokens of a block: large ones for speed, small ones for the rest of a row. With large ones alone, a prefill
# of 8 rows of 64 tokens took 6.6 ms per layer on CPU (H 12, K 4, D 64, bfloat16), now 1.7.
LARGE, SMALL = 512, 64


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

    def step(
        size: int, start: Array, i: Array, carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        top, total, acc = carry
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

        def tokens(pool: Array, columns: slice) -> Array:
            # Gathering (page, head) tiles leaves each head's tokens contiguous: no transpose before the
            # products. Columns are cut from the tiles: cut from the pool, they would copy it.
            tiles = pool.at[ids, head].get(mode="promise_in_bounds")[..., columns]
            return tiles.reshape(kv_heads, -1, head_dim).astype(dtype)

        scores = _batched("kmd,ksd->kms", q, tokens(*keys)) * pages.scale
        if pages.soft_cap is not None:
            scores = pages.soft_cap * jnp.tanh(scores / pages.soft_cap)
        scores = jnp.where(seen, scores, HIDDEN)
        higher = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0)
        decay = jnp.exp(top - higher)
        mixed = jnp.where(live[..., None], tokens(*values), 0)  # zero times NaN would be NaN
        mixed = _batched("kms,ksd->kmd", weights.astype(dtype), mixed)
        return higher, total * decay + weights.sum(-1), acc * decay[..., None] + mixed

    large, small = _block(LARGE, pages.k_pages), _block(SMALL, pages.k_pages)
    start = first // small * small
    larges = jnp.maximum(last - start, 0) // large
    rest = start + larges * large
    carry = jnp.full((kv_heads, queries), HIDDEN), jnp.zeros((kv_heads, queries)), jnp.zeros(q.shape)
    if large <= pages.page_ids.shape[2]:
        carry = lax.fori_loop(0, larges, functools.partial(step, large, start), carry)
    smalls = (jnp.maximum(last - rest, 0) + small - 1) // small
    return _finish(*lax.fori_loop(0, smalls, functools.partial(step, small, rest), carry), sinks)


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
