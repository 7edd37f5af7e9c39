"""`quantized_prefill_attention` on Hopper GPUs: the pages that the chunks see are opened once, then read as dense ones.

A chunk has many query tiles that read the same history, so opening costs less than widening codes in each of them. The
scratch has as many pages as the pool; only those that are seen are ever touched.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import codes
from pallas_kernels.mosaic_gpu import chunks, work
from pallas_kernels.mosaic_gpu.coded_decode import Shape
from pallas_kernels.mosaic_gpu.opening import open_listed
from pallas_kernels.mosaic_gpu.prefill import Config
from pallas_kernels.mosaic_gpu.target import require_plain


def quantized_prefill_attention(
    q: jax.Array,
    k_codes: jax.Array,
    v_codes: jax.Array | None,
    scales: jax.Array,
    page_ids: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    query_starts: jax.Array,
    *,
    logical_ids: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.quantized_prefill_attention`. `config` overrides the heuristic."""
    tokens, _, head_dim = q.shape
    require_plain(k_codes, v_codes, head_dim)
    pages, kv_heads, page = *k_codes.shape[:2], codes.page_size(k_codes)
    owned = query_starts[1:] - query_starts[:-1]
    newest = jnp.where(owned > 0, (lengths - 1) // page * page, 0)
    stop = work.tokens_before(newest, counts, logical_ids, page) // page
    first = jnp.zeros_like(stop)
    if window is not None:
        first = work.tokens_before(lengths - owned + 1 - window, counts, logical_ids, page) // page
    shape = Shape(
        *(lengths.shape[0], kv_heads, 1, *page_ids.shape[1:]), page, head_dim, codes.codec_of(k_codes), scales.shape[2]
    )
    scratch = (lax.empty((pages, kv_heads, page, head_dim), q.dtype) for _ in range(2))
    pools = open_listed(*scratch, k_codes, v_codes, scales, page_ids, page_ids, first, stop, shape=shape)
    options: dict[str, Any] = {"logical_ids": logical_ids, "scale": scale, "window": window, "soft_cap": soft_cap}
    lists = (page_ids, counts, lengths, query_starts, owned)
    out, lse = chunks.attend(q, *pools, *lists, **options, own_page=False, config=config)
    return chunks.finished(out, lse, chunks.row_of(query_starts, tokens)[1], sinks, q.dtype, return_lse)
