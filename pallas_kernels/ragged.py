"""Rows that own ragged chunks of query tokens, in XLA: a loop over the tiles of a row's chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.blockwise import Queries, attend
from pallas_kernels.groups import HIDDEN
from pallas_kernels.pages import Pages

# Tokens of a query tile. Tiles of 128 are 8% faster on a chunk of 512 tokens, but twice as slow on 8 rows of 64.
LARGE = 64
SMALL_QUERIES = 32
"""Least queries of a small tile: of fewer, `Pages.dtype` makes other products."""


def padded(flat: Array) -> Array:
    """Room around the T tokens of `flat` for tiles that reach past them; token t lies at ``LARGE + t``."""
    return jnp.pad(flat, ((LARGE, LARGE), *((0, 0),) * (flat.ndim - 1)))


def over_tiles[Carry](
    query_starts: Array,
    lengths: Array,
    row: Array,
    groups: int,
    tile: Callable[[int, Array, Array, Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Runs `tile(size, start, anchor, positions, carry)` over the query tiles of a row, in ascending order.

    A tile has `size` tokens from ``padded(..)[start]`` on, at `positions` [size], which are -1 outside of the chunk.
    Tiles begin at multiples of their size, and the blocks of pages they read follow from `anchor`, a multiple of the
    largest size: so every bit of a result depends on the position of the query, not on the chunk that brings it.
    """
    first, stop = query_starts[row], query_starts[row + 1]
    begin, end = lengths[row] - (stop - first), lengths[row]

    def run(size: int, index: Array, carry: Carry) -> Carry:
        origin = index * size
        position = origin + jnp.arange(size)
        live = (position >= begin) & (position < end)
        start, anchor = LARGE + first + origin - begin, origin // LARGE * LARGE
        return tile(size, start, anchor, jnp.where(live, position, -1), carry)

    small = min(LARGE, 1 << (-(-SMALL_QUERIES // groups) - 1).bit_length())
    rest = jnp.maximum(end // LARGE * LARGE, begin)  # where the last tile begins, if it is not full
    last = jnp.where(end - rest > small, -(-end // LARGE), end // LARGE)
    carry = lax.fori_loop(begin // LARGE, last, functools.partial(run, LARGE), carry)
    few = jnp.where(end - rest > small, 0, -(-end // small))
    return lax.fori_loop(rest // small, few, functools.partial(run, small), carry)


def by_kv_head(flat: Array, start: Array, size: int, kv_heads: int) -> Array:
    """`size` tokens of `flat` [T, H, ..] from `start` on, as the M = size * G queries of each KV head [K, M, ..]."""
    tile = lax.dynamic_slice_in_dim(flat, start, size)
    tile = tile.reshape(size, kv_heads, -1, *flat.shape[2:]).swapaxes(0, 1)
    return tile.reshape(kv_heads, -1, *flat.shape[2:])


def by_token(queries: Array, size: int) -> Array:
    """[K, M, ..] as [size, H, ..]."""
    kv_heads, _, *rest = queries.shape
    return queries.reshape(kv_heads, size, -1, *rest).swapaxes(0, 1).reshape(size, -1, *rest)


type Results = tuple[Array, Array]


def prefill_rows(
    q: Array, pages: Pages, lengths: Array, query_starts: Array, sinks: Array | None, own_page: bool = True
) -> tuple[Array, Array]:
    """Causal attention of the chunks that rows own: out [T, H, D] in the dtype of q and log-sum-exp [T, H].

    Without `own_page` a query sees only the pages before the one that holds its position.
    """
    tokens, kv_heads = q.shape[0], pages.k_pages.shape[1]
    groups = q.shape[1] // kv_heads
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, 1, groups)
    flat = padded(q)

    def one_row(row: Array, results: Results) -> Results:
        def tile(size: int, start: Array, anchor: Array, positions: Array, results: Results) -> Results:
            query, live = by_kv_head(flat, start, size, kv_heads), positions >= 0
            positions = jnp.repeat(positions, groups)
            last = None if own_page else positions // pages.page_size * pages.page_size - 1
            sink = None
            if sinks is not None:
                sink = jnp.broadcast_to(sinks, (kv_heads, size, groups)).reshape(kv_heads, -1)
            out, lse = attend(Queries(query, positions, row, last, anchor), pages, sink)
            return (
                _put(results[0], by_token(out, size).astype(q.dtype), start, live[:, None, None]),
                _put(results[1], by_token(lse, size), start, live[:, None]),
            )

        return over_tiles(query_starts, lengths, row, groups, tile, results)

    nothing = jnp.zeros_like(flat), jnp.full(flat.shape[:2], HIDDEN)
    out, lse = lax.fori_loop(0, lengths.shape[0], one_row, nothing)
    return out[LARGE : LARGE + tokens], lse[LARGE : LARGE + tokens]


def _put(flat: Array, tile: Array, start: Array, live: Array) -> Array:
    """`flat` with the live entries of `tile` from `start` on: others belong to the rows around."""
    kept = lax.dynamic_slice_in_dim(flat, start, len(tile))
    return lax.dynamic_update_slice_in_dim(flat, jnp.where(live, tile, kept), start, 0)
