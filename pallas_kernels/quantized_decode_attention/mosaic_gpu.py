"""`quantized_decode_attention` on Hopper and newer GPUs."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels import codes
from pallas_kernels.mosaic_gpu import work
from pallas_kernels.mosaic_gpu.coded_decode import Shape, decode
from pallas_kernels.mosaic_gpu.split import Config
from pallas_kernels.mosaic_gpu.target import require_plain, require_tma


def quantized_decode_attention(
    q: jax.Array,
    k_codes: jax.Array,
    v_codes: jax.Array | None,
    scales: jax.Array,
    page_ids: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    *,
    logical_ids: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.quantized_decode_attention`. `config` overrides the heuristic."""
    batch, _, head_dim = q.shape
    require_plain(k_codes, v_codes, head_dim)
    kv_heads, page = k_codes.shape[1], codes.page_size(k_codes)
    shape = Shape(batch, kv_heads, 1, *page_ids.shape[1:], page, head_dim, codes.codec_of(k_codes), scales.shape[2])
    queries, parts = work.grouped(q, kv_heads, 16 * shape.row_warps)
    shape = dataclasses.replace(shape, parts=parts)
    require_tma()
    config = config or Config.measured("quantized_decode_attention", k_codes.dtype, shape)
    config = config or shape.default(scales.dtype.itemsize)
    shape.check(config, q.dtype, scales.dtype)
    first, stop = work.visible_range(lengths, counts, logical_ids, window, page)
    partial = decode(
        queries,
        k_codes,
        v_codes,
        scales,
        page_ids,
        first,
        stop,
        shape=shape,
        scale=scale,
        soft_cap=soft_cap,
        config=config,
    )
    return work.finished(partial, sinks, q, kv_heads, return_lse)
