"""`quantize_pages` in XLA: blocks of listed pages, scattered in place."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels import moves
from pallas_kernels.quantize_pages.transform import encoder


def quantize_pages(
    k_codes: Array,
    v_codes: Array | None,
    scales: Array,
    k_pages: Array,
    v_pages: Array | None,
    page_ids: Array,
    targets: Array,
    *,
    head_dim: int,
    count: Array | None = None,
) -> moves.Pools:
    """See `pallas_kernels.quantize_pages`."""
    into = (k_codes, v_codes, scales)
    transform = encoder(*into, head_dim)
    return moves.in_blocks(transform, into, (k_pages, v_pages), page_ids, targets, count)
