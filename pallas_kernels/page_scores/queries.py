"""Queries as the products with bounds take them."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.groups import reduce_group


def beside(q: Float[Array, "B H D"], kv_heads: int, width: int, group: str) -> Float32[Array, "B K G X"]:
    """[min(q, 0), max(q, 0)] of each query head, each half padded to half of `width`.

    The product of one of these with a page's bounds is their score, and linear in each half: unless the largest of a
    group is asked for, G is 1.
    """
    rows, _, head_dim = q.shape
    queries = q.astype(jnp.float32).reshape(rows, kv_heads, -1, head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, width // 2 - head_dim)))
    queries = jnp.concatenate([jnp.minimum(queries, 0), jnp.maximum(queries, 0)], axis=-1)
    return queries if group == "max" else reduce_group(queries, group, axis=2)[:, :, None]


def split(queries: Float32[Array, "*shape"], dtype: jnp.dtype) -> list[Float[Array, "*shape"]]:
    """Two numbers of `dtype` whose sum is a query to about its last bit, so that scores stay bounds."""
    high = queries.astype(dtype)
    return [high, (queries - high.astype(jnp.float32)).astype(dtype)]
