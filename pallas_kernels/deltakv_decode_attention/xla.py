"""`deltakv_decode_attention` in XLA: a loop over rows, in it one over blocks of pages, values absorbed."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.deltakv import Grid, Weights, halves
from pallas_kernels.deltakv_pools import DeltaPools, base_and_latents
from pallas_kernels.groups import HIDDEN
from pallas_kernels.pages import MEDIUM, batched, block_of
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
    kv_heads, groups, latent = pools.centers.shape[2], pools.latents.shape[1], pools.latents.shape[3]
    size = min(block_of(MEDIUM, grid.page_size), page_ids.shape[2])
    g = weights["g"].astype(jnp.float32).reshape(groups, kv_heads // groups, 2, head_dim, latent)
    g_keys, g_values = g[:, :, 0], g[:, :, 1]
    padding = ((0, 0), (0, -page_ids.shape[2] % size))
    ids = jnp.pad(page_ids[:, 0], padding)
    logical = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    if logical_ids is not None:
        logical = jnp.pad(logical_ids[:, 0], padding)

    def one_row(row: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        query = q[row].astype(jnp.float32).reshape(kv_heads, -1, head_dim)
        span = heads // kv_heads

        def block(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, latents, bases = carry
            entry = i * size + jnp.arange(size)
            listed = entry < counts[row, 0]
            position = lax.dynamic_slice(logical, (row, i * size), (1, size))[0]
            position = (position[:, None] * grid.page_size + jnp.arange(grid.page_size)).ravel()
            seen = jnp.repeat(listed, grid.page_size) & (position < lengths[row])
            pages = jnp.where(listed, lax.dynamic_slice(ids, (row, i * size), (1, size))[0], 0)
            base, z = base_and_latents(pools, pages, tables[row], grid)
            base, z = base.reshape(-1, *base.shape[2:]), z.reshape(-1, *z.shape[2:])
            base_keys, base_values = halves(base, kv_heads)
            keys = base_keys + batched("tac,amdc->tamd", z, g_keys).reshape(-1, kv_heads, head_dim)
            keys = rotated(keys, jnp.where(seen, position, 0), frequencies, magnitude)
            scores = batched("kgd,skd->kgs", query, keys) * scale
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            scores = jnp.where(seen, scores, HIDDEN)
            higher = jnp.maximum(top, scores.max(-1))
            share, decay = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0), jnp.exp(top - higher)
            z, base_values = jnp.where(seen[:, None, None], z, 0), jnp.where(seen[:, None, None], base_values, 0)
            by_group = share.reshape(groups, -1, share.shape[-1])
            mixed = batched("ams,sac->amc", by_group, z).reshape(kv_heads, span, latent)
            summed = batched("kgs,skd->kgd", share, base_values)
            decayed = decay[..., None]
            return higher, total * decay + share.sum(-1), latents * decayed + mixed, bases * decayed + summed

        flat = (kv_heads, span)
        carry = (jnp.full(flat, HIDDEN), jnp.zeros(flat), jnp.zeros((*flat, latent)), jnp.zeros((*flat, head_dim)))
        top, total, latents, bases = lax.fori_loop(0, -(-counts[row, 0] // size), block, carry)
        by_head = latents.reshape(groups, -1, span, latent)
        out = bases + batched("amgc,amdc->amgd", by_head, g_values).reshape(bases.shape)
        sees = total > 0
        whole = jnp.where(sees, total, 1)
        out = jnp.where(sees[..., None], out / whole[..., None], 0).reshape(heads, head_dim).astype(q.dtype)
        lse = jnp.where(sees, top + jnp.log(whole), HIDDEN).ravel()
        return results[0].at[row].set(out), results[1].at[row].set(lse)

    out, lse = lax.fori_loop(0, q.shape[0], one_row, (jnp.zeros_like(q), jnp.zeros(q.shape[:2])))
    return (out, lse) if return_lse else out
