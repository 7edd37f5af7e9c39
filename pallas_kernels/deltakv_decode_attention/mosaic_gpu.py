"""`deltakv_decode_attention` on Hopper GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deltakv import Grid, Weights
from pallas_kernels.deltakv_decode_attention.named import centers_of_lists
from pallas_kernels.deltakv_pools import DeltaPools
from pallas_kernels.mosaic_gpu import work
from pallas_kernels.mosaic_gpu.latents import CHUNK, NAMED, QUERIES, ROWS, Shape, decode
from pallas_kernels.mosaic_gpu.target import require_tma
from pallas_kernels.pages import batched


def deltakv_decode_attention(
    q: jax.Array,
    pools: DeltaPools,
    weights: Weights,
    frequencies: jax.Array,
    page_ids: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    tables: jax.Array,
    *,
    grid: Grid,
    logical_ids: jax.Array | None = None,
    magnitude: float,
    scale: float,
    soft_cap: float | None,
    return_lse: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.deltakv_decode_attention`."""
    batch, heads, head_dim = q.shape
    kv_heads, (_, _, rows, latent) = pools.centers.shape[2], pools.latents.shape
    queries, parts = work.grouped(q, kv_heads, QUERIES)
    shape = Shape(batch, kv_heads, parts, 1, page_ids.shape[2], grid.page_size, head_dim, latent, grid)
    config = shape.default()
    shape.check(config, q.dtype, rows)
    require_tma(exactly_hopper=True)
    g = weights["g"].reshape(kv_heads, 2, head_dim, latent)
    found = centers_of_lists(pools, page_ids, counts, tables, grid)
    entries = page_ids.shape[2]
    numbers = found.pages * grid.own + found.slots
    taken = found.taken.swapaxes(2, 3).reshape(batch, entries, -1)
    scales = found.scales.reshape(batch, entries, -1, kv_heads, 2).transpose(0, 3, 1, 4, 2)
    scales = jnp.pad(scales, ((0, 0),) * 4 + ((0, NAMED - scales.shape[-1]),)).reshape(batch, kv_heads, entries, -1)
    starts = jnp.arange(max(tables.shape[1], entries)) * grid.page_size
    offsets = np.asarray(places(grid))
    first, stop = work.visible_range(lengths, counts, logical_ids, None, grid.page_size)
    logical = jnp.broadcast_to(jnp.arange(entries, dtype=jnp.int32), page_ids.shape)
    out, *sums = decode(
        jnp.pad(queries, ((0, 0), (0, 0), (0, ROWS - queries.shape[2]), (0, 0))),
        pools.latents,
        pools.latent_scales,
        pools.centers.reshape(-1, kv_heads, 2 * head_dim),
        g[:, 0].astype(q.dtype).reshape(kv_heads, head_dim, -1, CHUNK).swapaxes(1, 2).reshape(-1, head_dim, CHUNK),
        numbers,
        taken,
        scales,
        _turns(starts[:, None] * frequencies, magnitude).reshape(len(starts), -1),
        _turns(frequencies[:, None] * offsets, 1.0).swapaxes(0, 1),
        jnp.asarray(offsets, jnp.int32),
        page_ids,
        logical if logical_ids is None else logical_ids,
        first,
        stop,
        shape=shape,
        scale=scale,
        soft_cap=soft_cap,
        config=config,
    )
    out, lse = work.merge(out.swapaxes(3, 4), *(x[..., :QUERIES] for x in sums), None)
    out, lse = (work.ungrouped(x, kv_heads, heads) for x in (out, lse))
    mixed = out[..., :latent].reshape(batch, kv_heads, -1, latent)
    values = batched("bkgc,kdc->bkgd", mixed, g[:, 1].astype(jnp.float32)).reshape(q.shape)
    out = (values + out[..., latent:]).astype(q.dtype)
    return (out, lse) if return_lse else out


def places(grid: Grid) -> np.ndarray:
    """The token of a page at each place of its padded latents: those that are no centers, then the centers."""
    token = np.arange(grid.page_size)
    return np.concatenate([token[token % grid.stride != 0], token[:: grid.stride]])


def _turns(angles: jax.Array, magnitude: float) -> jax.Array:
    """cos and sin [X, 2, ..] of angles [X, ..]."""
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1) * magnitude
