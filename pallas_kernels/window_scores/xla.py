"""`window_scores` in XLA: per row one pass for the log-sum-exp of its queries, one for the mass they give."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import mass
from pallas_kernels.blockwise import Queries, log_sum_exp
from pallas_kernels.pages import Pages


def window_scores(
    q: Array,
    k_pages: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    *,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    group: str = "mean",
) -> Array:
    """See `pallas_kernels.window_scores`."""
    rows, size, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    groups = heads // kv_heads
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    pages = Pages.of(k_pages, None, page_ids, counts, logical_ids, **options)
    if sinks is not None:
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, groups), (1, size))
    by_head = q.reshape(rows, size, kv_heads, groups, head_dim).swapaxes(1, 2)

    def one_row(row: Array, total: Array) -> Array:
        positions = jnp.maximum(lengths[row] - size + jnp.arange(size), -1)
        queries = Queries(
            by_head[row].reshape(kv_heads, -1, head_dim), jnp.repeat(positions, groups), row
        )
        return mass.add(total, queries, log_sum_exp(queries, pages, sinks), pages, groups, group)

    total = lax.fori_loop(0, rows, one_row, mass.nothing(pages, True))
    return total[:, :, : page_ids.shape[2]]
