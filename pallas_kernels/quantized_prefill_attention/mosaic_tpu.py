"""`quantized_prefill_attention` on TPU: the kernel of dense attention, its pages widened from codes in VMEM."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from pallas_kernels import codes
from pallas_kernels.mosaic_tpu import work
from pallas_kernels.mosaic_tpu.interpret import Interpret
from pallas_kernels.mosaic_tpu.prefill import prefill


def quantized_prefill_attention(
    q: Array,
    k_codes: Array,
    v_codes: Array | None,
    scales: Array,
    *lists: Array,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    interpret: Interpret | None = None,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.quantized_prefill_attention`."""
    work.check_codes(k_codes, v_codes, scales, q.shape[-1])
    pools = (k_codes, scales) if v_codes is None else (k_codes, v_codes, scales)
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks": sinks}
    options |= {"logical_ids": logical_ids, "return_lse": return_lse, "interpret": interpret}
    return prefill(q, pools, *lists, codec=codes.codec_of(k_codes), own_page=False, **options)
