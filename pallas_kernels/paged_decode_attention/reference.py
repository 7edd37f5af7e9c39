"""`paged_decode_attention` in plain jnp, float32: gathers every listed page and masks."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import layouts

HIDDEN = -1e30


def paged_decode_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array | None,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    *,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.paged_decode_attention`."""
    k_pages, v_pages = layouts.views(k_pages, v_pages, q.shape[-1])
    rows, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    lists = (rows, kv_heads, page_ids.shape[2])
    listed = jnp.broadcast_to(jnp.arange(lists[2]) < counts[:, :, None], lists)
    ids = jnp.where(listed, page_ids, 0)
    logical = jnp.broadcast_to(jnp.arange(lists[2]) if logical_ids is None else logical_ids, lists)
    position = logical[..., None] * page_size + jnp.arange(page_size)  # [B, K, J, P]
    length = lengths[:, None, None, None]
    visible = listed[..., None] & (position < length)
    if window is not None:
        visible &= position >= length - window

    def tokens(pages: Array) -> Array:  # [B, K, J * P, D], hidden ones zero
        gathered = pages[ids, jnp.arange(kv_heads)[:, None]].astype(jnp.float32)
        return jnp.where(visible[..., None], gathered, 0).reshape(rows, kv_heads, -1, head_dim)

    queries = q.astype(jnp.float32).reshape(rows, kv_heads, -1, head_dim)
    scores = jnp.einsum("bkgd,bksd->bkgs", queries, tokens(k_pages), precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = visible.reshape(rows, kv_heads, 1, -1)
    scores = jnp.where(seen, scores, HIDDEN)
    sink = jnp.full(heads, HIDDEN) if sinks is None else sinks.astype(jnp.float32)
    sink = sink.reshape(kv_heads, -1)
    top = jnp.maximum(scores.max(-1), sink)
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0)
    total = weights.sum(-1) + jnp.exp(sink - top)
    sees = seen.any(-1)  # [B, K, 1]
    out = jnp.einsum("bkgs,bksd->bkgd", weights, tokens(v_pages), precision="highest")
    out = jnp.where(sees[..., None], out / total[..., None], 0).reshape(q.shape).astype(q.dtype)
    lse = jnp.where(sees, top + jnp.log(total), HIDDEN).reshape(rows, heads)
    return (out, lse) if return_lse else out
