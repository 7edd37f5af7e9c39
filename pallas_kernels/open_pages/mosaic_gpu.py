"""`open_pages` on Hopper and newer GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import codes
from pallas_kernels.mosaic_gpu.coded_decode import Shape
from pallas_kernels.mosaic_gpu.opening import open_listed
from pallas_kernels.mosaic_gpu.target import require_plain, require_tma


def open_pages(
    k_pages: jax.Array,
    v_pages: jax.Array | None,
    k_codes: jax.Array,
    v_codes: jax.Array | None,
    scales: jax.Array,
    page_ids: jax.Array,
    targets: jax.Array,
    *,
    head_dim: int,
    count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.open_pages`."""
    require_plain(k_pages, v_pages, head_dim)
    require_plain(k_codes, v_codes, head_dim)
    require_tma()
    items, kv_heads, page = page_ids.shape[0], k_codes.shape[1], codes.page_size(k_codes)
    shape = Shape(1, kv_heads, 1, 1, items, page, head_dim, codes.codec_of(k_codes), scales.shape[2])
    stop = jnp.full((1, 1), items, jnp.int32) if count is None else jnp.minimum(count, items).reshape(1, 1)
    lists = (page_ids[None, None], targets[None, None], jnp.zeros_like(stop), stop)
    return open_listed(k_pages, v_pages, k_codes, v_codes, scales, *lists, shape=shape)
