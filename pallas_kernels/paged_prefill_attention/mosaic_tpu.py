"""`paged_prefill_attention` on TPU."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from pallas_kernels.mosaic_tpu import work
from pallas_kernels.mosaic_tpu.interpret import Interpret
from pallas_kernels.mosaic_tpu.prefill import prefill


def paged_prefill_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array | None,
    *lists: Array,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    interpret: Interpret | None = None,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.paged_prefill_attention`. `v_pages` None: `k_pages` holds K in [..., :D] and V in
    [..., D:2D]."""
    work.check_pool(k_pages, v_pages, q.shape[-1])
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    options |= {"logical_ids": logical_ids, "return_lse": return_lse, "interpret": interpret}
    return prefill(q, (k_pages,) if v_pages is None else (k_pages, v_pages), *lists, **options)
