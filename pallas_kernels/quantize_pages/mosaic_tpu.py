"""`quantize_pages` on TPU: pages pass through VMEM, one after the other."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels.mosaic_tpu.moves import listed
from pallas_kernels.moves import Pools
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
) -> Pools:
    """See `pallas_kernels.quantize_pages`."""
    into = (k_codes, v_codes, scales)
    transform = encoder(*into, head_dim)
    return listed(transform, into, (k_pages, v_pages), page_ids, targets, count, "quantize_pages")
