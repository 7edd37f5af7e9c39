"""`deltakv_decode_attention` in plain jnp, float32: rebuilds every listed page, then attends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.deltakv import Grid, Weights, halves
from pallas_kernels.deltakv_pools import DeltaPools, read_pages
from pallas_kernels.groups import HIDDEN
from pallas_kernels.rotation import rotated


def deltakv_decode_attention(
    q: Array,
    pools: DeltaPools,
    weights: Weights,
    frequencies: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    tables: Array,
    *,
    grid: Grid,
    logical_ids: Array | None = None,
    magnitude: float,
    scale: float,
    soft_cap: float | None,
    return_lse: bool,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.deltakv_decode_attention`."""
    heads, head_dim = q.shape[1:]
    kv_heads, width = pools.centers.shape[2], page_ids.shape[2]
    listed = jnp.arange(width) < counts
    ids = jnp.where(listed, page_ids[:, 0], 0)
    logical = jnp.broadcast_to(jnp.arange(width) if logical_ids is None else logical_ids[:, 0], ids.shape)

    def one(query: Array, ids: Array, logical: Array, listed: Array, length: Array, table: Array) -> tuple:
        x = read_pages(pools, weights, ids, table, grid)
        position = (logical[:, None] * grid.page_size + jnp.arange(grid.page_size)).ravel()
        seen = jnp.repeat(listed, grid.page_size) & (position < length)
        keys, values = halves(x.reshape(-1, *x.shape[2:]), kv_heads)
        keys = rotated(keys, jnp.where(seen, position, 0), frequencies, magnitude)
        grouped = query.astype(jnp.float32).reshape(kv_heads, -1, head_dim)
        scores = jnp.einsum("kgd,skd->kgs", grouped, keys, precision="highest") * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(seen, scores, HIDDEN)
        lse = jax.nn.logsumexp(scores, axis=-1)
        share = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0)
        out = jnp.einsum("kgs,skd->kgd", share, jnp.where(seen[:, None, None], values, 0), precision="highest")
        return out.reshape(heads, head_dim).astype(q.dtype), jnp.where(seen.any(), lse.ravel(), HIDDEN)

    out, lse = jax.vmap(one)(q, ids, logical, listed, lengths, tables)
    return (out, lse) if return_lse else out
