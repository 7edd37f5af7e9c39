"""`paged_decode_attention` in XLA: a loop over rows, in it a loop over blocks of the row's own pages."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.blockwise import Pages, attend


def paged_decode_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array | None,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    *,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.paged_decode_attention`."""
    kv_heads = k_pages.shape[1]
    groups = q.shape[1] // kv_heads
    pages = Pages.of(
        k_pages,
        v_pages,
        page_ids,
        counts,
        logical_ids,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, groups)

    def one_row(row: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        query = q[row].reshape(kv_heads, groups, -1)
        out, lse = attend(query, jnp.full(groups, lengths[row] - 1), row, pages, sinks)
        out = out.reshape(q.shape[1:]).astype(q.dtype)
        return results[0].at[row].set(out), results[1].at[row].set(lse.ravel())

    # Rows run in order: the products inside already keep the cores busy, so independent loops over parts of
    # the rows gained nothing (8.8 against 8.9 ms for 4 rows of 16384 tokens on two cores).
    out, lse = lax.fori_loop(0, q.shape[0], one_row, (jnp.zeros_like(q), jnp.zeros(q.shape[:2])))
    return (out, lse) if return_lse else out
