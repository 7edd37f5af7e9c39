"""`paged_prefill_attention` in XLA: a loop over rows, in it query tiles, in each the blocks of pages that it
may see."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import ragged
from pallas_kernels.blockwise import Queries, attend
from pallas_kernels.groups import HIDDEN
from pallas_kernels.pages import Pages

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
    tokens, kv_heads = q.shape[0], k_pages.shape[1]
    groups = q.shape[1] // kv_heads
    pages = Pages.of(
        k_pages, v_pages, page_ids, counts, logical_ids, scale=scale, window=window, soft_cap=soft_cap
    )
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, 1, groups)
    padded = ragged.padded(q)

    def one_row(row: Array, results: Results) -> Results:
        def tile(size: int, start: Array, positions: Array, results: Results) -> Results:
            query = ragged.by_kv_head(padded, start, size, kv_heads)
            sink = None
            if sinks is not None:
                sink = jnp.broadcast_to(sinks, (kv_heads, size, groups)).reshape(kv_heads, -1)
            out, lse = attend(Queries(query, jnp.repeat(positions, groups), row), pages, sink)
            # A tile that reaches past its row spills hidden results, which the rows that follow write over.
            return (
                lax.dynamic_update_slice(
                    results[0], ragged.by_token(out, size).astype(q.dtype), (start, 0, 0)
                ),
                lax.dynamic_update_slice(results[1], ragged.by_token(lse, size), (start, 0)),
            )

        return ragged.over_tiles(query_starts, lengths, row, tile, results)

    nothing = jnp.zeros_like(padded), jnp.full(padded.shape[:2], HIDDEN)
    out, lse = (r[:tokens] for r in lax.fori_loop(0, lengths.shape[0], one_row, nothing))
    return (out, lse) if return_lse else out
