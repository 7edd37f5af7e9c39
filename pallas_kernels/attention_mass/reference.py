"""`attention_mass` in plain jnp, float32: every query token gathers the listed keys of its row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import codes
from pallas_kernels.groups import reduce_group


def attention_mass(
    q: Array,
    k_pages: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    lse: Array,
    query_starts: Array | None = None,
    *,
    scales: Array | None = None,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    group: str = "sum",
    per_token: bool = False,
) -> Array:
    """See `pallas_kernels.attention_mass`."""
    tokens, heads, head_dim = q.shape
    rows, kv_heads = lengths.shape[0], k_pages.shape[1]
    keys = codes.keys(k_pages, scales, head_dim)  # [N, K, P, D] float32
    token = jnp.arange(tokens)
    if query_starts is None:
        query_starts = jnp.arange(rows + 1)
    row = jnp.searchsorted(query_starts, token, side="right") - 1
    owned = (row >= 0) & (row < rows)
    row = jnp.clip(row, 0, rows - 1)
    position = jnp.where(owned, lengths[row] - (query_starts[row + 1] - token), -1)
    lists = (tokens, kv_heads, page_ids.shape[2])
    listed = jnp.broadcast_to((jnp.arange(lists[2]) < counts[:, :, None])[row], lists)
    ids = jnp.where(listed, page_ids[row], 0)
    logical = jnp.broadcast_to(jnp.arange(lists[2]) if logical_ids is None else logical_ids[row], lists)
    slot = logical[..., None] * keys.shape[2] + jnp.arange(keys.shape[2])  # [T, K, S, P]
    here = position[:, None, None, None]
    seen = listed[..., None] & (slot <= here)
    if window is not None:
        seen &= slot > here - window
    gathered = jnp.where(seen[..., None], keys[ids, jnp.arange(kv_heads)[:, None]], 0)
    queries = q.astype(jnp.float32).reshape(tokens, kv_heads, -1, head_dim)
    scores = jnp.einsum("tkgd,tkspd->tkgsp", queries, gathered, precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    total = lse.reshape(tokens, kv_heads, -1, 1, 1)
    mass = jnp.exp(jnp.where(seen[:, :, None], scores - total, -jnp.inf))
    mass = reduce_group(mass if per_token else mass.sum(-1), group, axis=2)
    return jax.ops.segment_sum(mass, row, rows)
