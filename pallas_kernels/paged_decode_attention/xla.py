"""`paged_decode_attention` in XLA: a loop over rows, in it a loop over blocks of the row's own pages."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels.blockwise import decode_rows
from pallas_kernels.pages import Pages


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
    pages = Pages.of(
        k_pages, v_pages, page_ids, counts, logical_ids, scale=scale, window=window, soft_cap=soft_cap
    )
    out, lse = decode_rows(q, pages, lengths, sinks)
    return (out, lse) if return_lse else out
