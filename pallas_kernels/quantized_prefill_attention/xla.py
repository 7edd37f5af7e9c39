"""`quantized_prefill_attention` in XLA: the loops of dense attention, over tiles of codes."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels.pages import Pages
from pallas_kernels.ragged import prefill_rows


def quantized_prefill_attention(
    q: Array,
    k_codes: Array,
    v_codes: Array | None,
    scales: Array,
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
    """See `pallas_kernels.quantized_prefill_attention`."""
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    pages = Pages.of(k_codes, v_codes, page_ids, counts, logical_ids, scales=scales, **options)
    out, lse = prefill_rows(q, pages, lengths, query_starts, sinks, own_page=False)
    return (out, lse) if return_lse else out
