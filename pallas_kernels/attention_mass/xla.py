"""`attention_mass` in XLA: a loop over rows, in it query tiles, in each the blocks of pages that it may see."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import mass, ragged
from pallas_kernels.blockwise import Queries
from pallas_kernels.pages import Pages


def attention_mass(
    q: Array,
    k_pages: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    lse: Array,
    query_starts: Array | None = None,
    *,
    scales: Array | None = None,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    group: str = "sum",
    per_token: bool = False,
) -> Array:
    """See `pallas_kernels.attention_mass`."""
    rows, kv_heads = lengths.shape[0], k_pages.shape[1]
    groups = q.shape[1] // kv_heads
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    pages = Pages.of(k_pages, None, page_ids, counts, logical_ids, scales=scales, **options)
    # One query per row needs no tiles, and compiles to a loop less.
    tokens, norms = (q, lse) if query_starts is None else (ragged.padded(q), ragged.padded(lse))

    def one_row(row: Array, total: Array) -> Array:
        def tile(size: int, start: Array, anchor: Array | None, positions: Array, total: Array) -> Array:
            query = ragged.by_kv_head(tokens, start, size, kv_heads)
            queries = Queries(query, jnp.repeat(positions, groups), row, anchor=anchor)
            norm = ragged.by_kv_head(norms, start, size, kv_heads)
            return mass.add(total, queries, norm, pages, groups, group)

        if query_starts is None:
            return tile(1, row, None, lengths[row][None] - 1, total)
        return ragged.over_tiles(query_starts, lengths, row, groups, tile, total)

    total = lax.fori_loop(0, rows, one_row, mass.nothing(pages, per_token))
    return total[:, :, : page_ids.shape[2]]
