"""`page_scores` in plain jnp, float32: the sum of the larger products, as the bound is defined."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.groups import HIDDEN, reduce_group


def page_scores(
    q: Array, bounds: Array, page_ids: Array, counts: Array, *, group: str = "max", scale: float
) -> Array:
    """See `pallas_kernels.page_scores`."""
    rows, _, head_dim = q.shape
    _, kv_heads, minor = bounds.shape
    listed = jnp.arange(page_ids.shape[2]) < counts[:, :, None]  # [B, Kl, S]
    entries = bounds[jnp.where(listed, page_ids, 0), jnp.arange(kv_heads)[:, None]].astype(jnp.float32)
    queries = q.astype(jnp.float32).reshape(rows, kv_heads, -1, 1, head_dim)  # [B, K, G, 1, D]
    low, high = entries[..., :head_dim], entries[..., minor // 2 : minor // 2 + head_dim]
    bound = jnp.maximum(queries * low[:, :, None], queries * high[:, :, None]).sum(-1) * scale
    return jnp.where(listed, reduce_group(bound, group, axis=2), HIDDEN)
