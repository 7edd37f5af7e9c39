"""KeyDiff (Park et al., arXiv 2504.15364): keys least like the mean direction of all keys. Needs no query."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.sparsity.keep.view import View, by_token, over_blocks


def scores(view: View) -> Float[Array, "K U"]:
    """Minus the cosine between each key and the mean of the unit keys of its KV head."""
    return -likeness(view)


def likeness(view: View) -> Float[Array, "K U"]:
    """Cosine between each key and the mean of the unit keys of its KV head."""
    kv_heads = view.k_pages.shape[1]
    total = over_blocks(
        view, lambda total, first, k, v, live: total + _unit(k).sum(1), jnp.zeros((kv_heads, view.head_dim))
    )
    mean = _unit(total)
    return by_token(view, lambda k, v: jnp.einsum("knd,kd->kn", _unit(k), mean), kv_heads)


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
