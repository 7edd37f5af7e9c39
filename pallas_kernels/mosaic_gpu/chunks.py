"""What surrounds the prefill kernel in XLA: chunks cut into query tiles, what each sees, results put back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.mosaic_gpu import work
from pallas_kernels.mosaic_gpu.prefill import ROWS, WARPGROUPS, Config, prefill, shared_bytes
from pallas_kernels.mosaic_gpu.target import require, require_pages, require_shared, require_tma
from pallas_kernels.mosaic_gpu.tiles import HIDDEN


def attend(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "N K P D"],
    v_pages: Float[Array, "N K P D"],
    page_ids: Int32[Array, "B Kl J"],
    counts: Int32[Array, "B Kl"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    owned: Int32[Array, " B"],
    *,
    logical_ids: Int32[Array, "B Kl J"] | None,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    own_page: bool = True,
    config: Config | None = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Attention of the first `owned` tokens of each row's chunk: out and log-sum-exp, of other tokens anything.

    Without `own_page` a query sees only the pages before the one of its position. Declines what the kernel cannot do.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, page = k_pages.shape[1:3]
    group, rows = heads // kv_heads, ROWS * WARPGROUPS
    require_pages(q, k_pages)
    require(group <= rows, f"at most {rows} query heads per KV head; got {group}")
    require_tma(exactly_hopper=True)
    config = config or Config.default(head_dim, q.dtype.itemsize)
    require_shared(shared_bytes(config, head_dim, q.dtype.itemsize))
    tile = work.query_tiles(query_starts, owned, tokens, rows // group)
    first, stop = work.tile_ranges(tile, query_starts, lengths, counts, logical_ids, window, page, own_page)
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
    return work.from_tiles(out, tile, tokens, group), work.from_tiles(lse, tile, tokens, group)


def row_of(query_starts: Int32[Array, " R"], tokens: int) -> tuple[Array, Array]:
    """The row of each of T tokens, in range, and whether it has one."""
    rows = query_starts.shape[0] - 1
    row = jnp.searchsorted(query_starts, jnp.arange(tokens), side="right") - 1
    return jnp.clip(row, 0, rows - 1), (row >= 0) & (row < rows)


def finished(
    out: Float[Array, "T H D"],
    lse: Float[Array, "T H"],
    has_row: Array,
    sinks: Float[Array, " H"] | None,
    dtype: jnp.dtype,
    return_lse: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """What a prefill op returns, with `sinks` in the denominators."""
    sees = has_row[:, None] & (lse > 0.5 * HIDDEN)
    if sinks is not None:
        joined = jnp.logaddexp(lse, sinks.astype(jnp.float32))
        out = out.astype(jnp.float32) * jnp.exp(lse - joined)[..., None]
        lse = joined
    out = jnp.where(sees[..., None], out, 0).astype(dtype)
    return (out, jnp.where(sees, lse, HIDDEN)) if return_lse else out
