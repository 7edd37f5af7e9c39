"""`paged_decode_attention` on TPU: one program per row (or row and KV head), pages streamed through VMEM."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_tpu import work
from pallas_kernels.mosaic_tpu.interpret import Interpret


def paged_decode_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array | None,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    *,
    logical_ids: Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    interpret: Interpret | None = None,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.paged_decode_attention`. `v_pages` None: `k_pages` holds K in [..., :D] and V in
    [..., D:2D]."""
    D = q.shape[-1]
    work.check_pool(k_pages, v_pages, D)
    out, lse = work.attend(
        q[:, None],
        (k_pages,) if v_pages is None else (k_pages, v_pages),
        page_ids,
        counts,
        logical_ids,
        work.lone_queries(lengths),
        scale=D**-0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
        lse=return_lse or sinks is not None,
        out_dtype=q.dtype if sinks is None else jnp.float32,
        interpret=interpret,
    )
    out, lse = out[:, 0], None if lse is None else lse[:, 0]
    if sinks is not None:
        out, lse = work.with_sinks(out, lse, sinks)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out
