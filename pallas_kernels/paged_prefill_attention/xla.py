"""`paged_prefill_attention` in XLA: a loop over rows, in it query tiles, in each the blocks of pages that it
may see."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.blockwise import HIDDEN, Pages, attend

# Tokens of a query tile. A last tile of up to SMALL_TAIL tokens, such as a decode row in a mixed step, is cut
# into single queries: 16 rows of one token at 1024 take 2.5 ms per layer on CPU so, and 5.0 ms in tiles of 8
# (H 12, K 4, D 64). Tiles of 128 are 8% faster on a chunk of 512 tokens, but twice as slow on 8 rows of 64.
LARGE, SMALL = 64, 1
SMALL_TAIL = 4

type Results = tuple[Array, Array]


def paged_prefill_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array | None,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    query_starts: Array,
    *,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.paged_prefill_attention`."""
    tokens, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    groups = heads // kv_heads
    pages = Pages.of(
        k_pages, v_pages, page_ids, counts, logical_ids, scale=scale, window=window, soft_cap=soft_cap
    )
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, 1, groups)
    padded = jnp.pad(q, ((0, LARGE), (0, 0), (0, 0)))

    def tile(size: int, row: Array, first: Array, index: Array, results: Results) -> Results:
        start = first + index * size
        stop = query_starts[row + 1]
        token = start + jnp.arange(size)
        position = jnp.where(token < stop, lengths[row] - (stop - token), -1)
        query = lax.dynamic_slice(padded, (start, 0, 0), (size, heads, head_dim))
        query = query.reshape(size, kv_heads, groups, head_dim).swapaxes(0, 1).reshape(kv_heads, -1, head_dim)
        sink = (
            None if sinks is None else jnp.broadcast_to(sinks, (kv_heads, size, groups)).reshape(kv_heads, -1)
        )
        out, lse = attend(query, jnp.repeat(position, groups), row, pages, sink)
        out = out.reshape(kv_heads, size, groups, head_dim).swapaxes(0, 1).reshape(size, heads, head_dim)
        lse = lse.reshape(kv_heads, size, groups).swapaxes(0, 1).reshape(size, heads)
        # A tile that reaches past its row spills hidden results, which the rows that follow write over.
        return (
            lax.dynamic_update_slice(results[0], out.astype(q.dtype), (start, 0, 0)),
            lax.dynamic_update_slice(results[1], lse, (start, 0)),
        )

    def one_row(row: Array, results: Results) -> Results:
        first = query_starts[row]
        count = query_starts[row + 1] - first
        full = count // LARGE + (count % LARGE > SMALL_TAIL)
        rest = jnp.maximum(count - full * LARGE, 0)
        results = lax.fori_loop(0, full, functools.partial(tile, LARGE, row, first), results)
        first += full * LARGE
        return lax.fori_loop(
            0, (rest + SMALL - 1) // SMALL, functools.partial(tile, SMALL, row, first), results
        )

    nothing = jnp.zeros_like(padded), jnp.full(padded.shape[:2], HIDDEN)
    out, lse = (r[:tokens] for r in lax.fori_loop(0, lengths.shape[0], one_row, nothing))
    return (out, lse) if return_lse else out
