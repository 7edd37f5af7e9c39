"""`paged_prefill_attention` in XLA: a loop over rows, in it query tiles, in each the blocks of pages that it
may see."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels.pages import Pages
from pallas_kernels.ragged import prefill_rows


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
    pages = Pages.of(
        k_pages, v_pages, page_ids, counts, logical_ids, scale=scale, window=window, soft_cap=soft_cap
    )
    out, lse = prefill_rows(q, pages, lengths, query_starts, sinks)
    return (out, lse) if return_lse else out
