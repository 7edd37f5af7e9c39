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

# Tokens of a query tile. A last tile of up to SMALL_TAIL tokens, such as a decode row in a mixed step, is cut
# into single queries: 16 rows of one token at 1024 take 2.5 ms per layer on CPU so, and 5.0 ms in tiles of 8
# (H 12, K 4, D 64). Tiles of 128 are 8% faster on a chunk of 512 tokens, but twice as slow on 8 rows of 64.
LARGE, SMALL = 64, 1
SMALL_TAIL = 4


def padded(flat: Array) -> Array:
    """Room behind the T tokens of `flat` for the last tile of the last row."""
    return jnp.pad(flat, ((0, LARGE), *((0, 0),) * (flat.ndim - 1)))


def over_tiles[Carry](
    query_starts: Array,
    lengths: Array,
    row: Array,
    tile: Callable[[int, Array, Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Runs `tile(size, start, positions, carry)` over the query tiles of a row, in ascending order.

    A tile has `size` tokens from token `start` on, at `positions` [size], which are -1 past the chunk.
    """
    first, stop = query_starts[row], query_starts[row + 1]

    def run(size: int, first: Array, index: Array, carry: Carry) -> Carry:
        start = first + index * size
        token = start + jnp.arange(size)
        return tile(size, start, jnp.where(token < stop, lengths[row] - (stop - token), -1), carry)

    count = stop - first
    full = count // LARGE + (count % LARGE > SMALL_TAIL)
    carry = lax.fori_loop(0, full, functools.partial(run, LARGE, first), carry)
    first += full * LARGE
    rest = (jnp.maximum(stop - first, 0) + SMALL - 1) // SMALL
    return lax.fori_loop(0, rest, functools.partial(run, SMALL, first), carry)


def by_kv_head(flat: Array, start: Array, size: int, kv_heads: int) -> Array:
    """`size` tokens of `flat` [T, H, ..] from `start` on, as the M = size * G queries of each KV head [K, M, ..]."""
    tile = lax.dynamic_slice_in_dim(flat, start, size)
    tile = tile.reshape(size, kv_heads, -1, *flat.shape[2:]).swapaxes(0, 1)
    return tile.reshape(kv_heads, -1, *flat.shape[2:])


def by_token(queries: Array, size: int) -> Array:
    """[K, M, ..] as [size, H, ..]."""
    kv_heads, _, *rest = queries.shape
    return queries.reshape(kv_heads, size, -1, *rest).swapaxes(0, 1).reshape(size, -1, *rest)


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

    def one_row(row: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        def tile(size: int, start: Array, positions: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
            query = by_kv_head(flat, start, size, kv_heads)
            positions = jnp.repeat(positions, groups)
            last = None if own_page else positions // pages.page_size * pages.page_size - 1
            sink = None
            if sinks is not None:
                sink = jnp.broadcast_to(sinks, (kv_heads, size, groups)).reshape(kv_heads, -1)
            out, lse = attend(Queries(query, positions, row, last), pages, sink)
            # A tile that reaches past its row spills hidden results, which the rows that follow write over.
            return (
                lax.dynamic_update_slice(results[0], by_token(out, size).astype(q.dtype), (start, 0, 0)),
                lax.dynamic_update_slice(results[1], by_token(lse, size), (start, 0)),
            )

        return over_tiles(query_starts, lengths, row, tile, results)

    nothing = jnp.zeros_like(flat), jnp.full(flat.shape[:2], HIDDEN)
    out, lse = lax.fori_loop(0, lengths.shape[0], one_row, nothing)
    return out[:tokens], lse[:tokens]
