"""`paged_prefill_attention` on Hopper GPUs.

Rows of one token (decode rows of a mixed step) take the decode kernel, which splits their lists over
blocks; the others are cut into query tiles. Both kernels run and follow their rows' counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import work
from pallas_kernels.mosaic_gpu.prefill import ROWS, WARPGROUPS, Config, prefill, shared_bytes
from pallas_kernels.mosaic_gpu.target import require, require_pages, require_plain, require_shared, require_tma
from pallas_kernels.mosaic_gpu.tiles import HIDDEN
from pallas_kernels.paged_decode_attention.mosaic_gpu import paged_decode_attention


def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
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
    """See `pallas_kernels.paged_prefill_attention`. `config` overrides the heuristic."""
    tokens, heads, head_dim = q.shape
    require_plain(k_pages, v_pages, head_dim)
    _, kv_heads, page, _ = k_pages.shape
    group, rows = heads // kv_heads, ROWS * WARPGROUPS
    require_pages(q, k_pages)
    require(group <= rows, f"at most {rows} query heads per KV head; got {group}")
    require_tma(exactly_hopper=True)
    config = config or Config.default(head_dim, q.dtype.itemsize)
    require_shared(shared_bytes(config, head_dim, q.dtype.itemsize))

    owned = query_starts[1:] - query_starts[:-1]
    single = owned == 1
    of_token = jnp.searchsorted(query_starts, jnp.arange(tokens), side="right") - 1
    has_row = (of_token >= 0) & (of_token < lengths.shape[0])
    of_token = jnp.clip(of_token, 0, lengths.shape[0] - 1)

    tile = work.query_tiles(query_starts, jnp.where(single, 0, owned), tokens, rows // group)
    first, stop = work.tile_ranges(tile, query_starts, lengths, counts, logical_ids, window, page)
    counted = tile.counted[:, None]
    highest = jnp.iinfo(jnp.int32).max
    bounds = jnp.stack(
        [
            jnp.where(counted, first, highest).min(-1),
            jnp.where(counted, stop, 0).max(-1),
            jnp.where(counted, first, 0).max(-1),
            jnp.where(counted, stop, highest).min(-1),
        ],
        axis=-1,
    )
    out, lse = prefill(
        work.to_tiles(q, tile, kv_heads, rows),
        k_pages,
        v_pages,
        page_ids,
        tile.row,
        work.per_query(first, tile, group, rows),
        work.per_query(stop, tile, group, rows),
        bounds,
        scale=scale,
        soft_cap=soft_cap,
        config=config,
    )
    out, lse = work.from_tiles(out, tile, tokens, group), work.from_tiles(lse, tile, tokens, group)
    lone, lone_lse = paged_decode_attention(
        q[jnp.clip(query_starts[:-1], 0, tokens - 1)],
        k_pages,
        v_pages,
        page_ids,
        counts,
        jnp.where(single, lengths, 0),
        logical_ids=logical_ids,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        return_lse=True,
    )
    is_lone = single[of_token][:, None]
    out = jnp.where(is_lone[..., None], lone[of_token], out)
    lse = jnp.where(is_lone, lone_lse[of_token], lse)
    sees = has_row[:, None] & (lse > 0.5 * HIDDEN)
    if sinks is not None:
        joined = jnp.logaddexp(lse, sinks.astype(jnp.float32))
        out = out.astype(jnp.float32) * jnp.exp(lse - joined)[..., None]
        lse = joined
    out = jnp.where(sees[..., None], out, 0).astype(q.dtype)
    return (out, jnp.where(sees, lse, HIDDEN)) if return_lse else out
