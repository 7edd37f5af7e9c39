"""`page_bounds` on TPU: pages pass through VMEM, one after the other."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels.mosaic_tpu.moves import listed
from pallas_kernels.page_bounds.minmax import minmax


def page_bounds(
    bounds: Array,
    k_pages: Array,
    page_ids: Array,
    targets: Array,
    *,
    scales: Array | None = None,
    count: Array | None = None,
) -> Array:
    """See `pallas_kernels.page_bounds`."""

    def transform(pages: Array, scales: Array | None) -> tuple[Array]:
        return (minmax(pages, scales, bounds.shape[2], bounds.dtype),)

    return listed(transform, (bounds,), (k_pages, scales), page_ids, targets, count, "page_bounds")[0]
