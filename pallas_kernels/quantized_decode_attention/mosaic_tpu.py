"""`quantized_decode_attention` on TPU: the kernel of dense attention, its pages widened from codes in VMEM."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import codes
from pallas_kernels.mosaic_tpu import work
from pallas_kernels.mosaic_tpu.interpret import Interpret


def quantized_decode_attention(
    q: Array,
    k_codes: Array,
    v_codes: Array | None,
    scales: Array,
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
    interpret: Interpret | None = None,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.quantized_decode_attention`."""
    work.check_codes(k_codes, v_codes, scales, q.shape[-1])
    out, lse = work.attend(
        q[:, None],
        (k_codes, scales) if v_codes is None else (k_codes, v_codes, scales),
        page_ids,
        counts,
        logical_ids,
        work.lone_queries(lengths),
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        lse=return_lse or sinks is not None,
        out_dtype=q.dtype if sinks is None else jnp.float32,
        codec=codes.codec_of(k_codes),
        interpret=interpret,
    )
    out, lse = out[:, 0], None if lse is None else lse[:, 0]
    if sinks is not None:
        out, lse = work.with_sinks(out, lse, sinks)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out
