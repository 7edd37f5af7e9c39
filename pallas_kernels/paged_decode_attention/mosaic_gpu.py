"""`paged_decode_attention` on Hopper and newer GPUs."""

from __future__ import annotations

import jax

from pallas_kernels.mosaic_gpu import work
from pallas_kernels.mosaic_gpu.decode import Shape, decode
from pallas_kernels.mosaic_gpu.split import Config
from pallas_kernels.mosaic_gpu.target import require_pages, require_plain, require_shared, require_tma


def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
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
    """See `pallas_kernels.paged_decode_attention`. `config` overrides the heuristic."""
    batch, _, head_dim = q.shape
    require_plain(k_pages, v_pages, head_dim)
    _, kv_heads, page, _ = k_pages.shape
    rows = 16 if head_dim % 32 == 0 else 32
    queries, parts = work.grouped(q, kv_heads, rows)
    shape = Shape(batch, kv_heads, parts, page_ids.shape[1], page_ids.shape[2], page, head_dim)
    require_pages(q, k_pages)
    require_tma()
    config = config or Config.measured("paged_decode_attention", k_pages.dtype, shape)
    config = config or shape.default(q.dtype.itemsize)
    require_shared(shape.shared_bytes(config, q.dtype.itemsize))
    first, stop = work.visible_range(lengths, counts, logical_ids, window, page)
    partial = decode(
        queries,
        k_pages,
        v_pages,
        page_ids,
        first,
        stop,
        shape=shape,
        scale=scale,
        soft_cap=soft_cap,
        config=config,
    )
    return work.finished(partial, sinks, q, kv_heads, return_lse)
