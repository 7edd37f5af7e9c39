"""`open_pages` on TPU: pages pass through VMEM, one after the other."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels.mosaic_tpu.moves import listed
from pallas_kernels.moves import Pools
from pallas_kernels.open_pages.transform import decoder


def open_pages(
    k_pages: Array,
    v_pages: Array | None,
    k_codes: Array,
    v_codes: Array | None,
    scales: Array,
    page_ids: Array,
    targets: Array,
    *,
    head_dim: int,
    count: Array | None = None,
) -> Pools:
    """See `pallas_kernels.open_pages`."""
    into = (k_pages, v_pages)
    transform = decoder(*into, head_dim)
    return listed(transform, into, (k_codes, v_codes, scales), page_ids, targets, count, "open_pages")
