"""`kv_write` as one scatter per pool."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array


def kv_write(
    k_pages: Array, v_pages: Array, k_new: Array, v_new: Array, page_ids: Array, offsets: Array
) -> tuple[Array, Array]:
    """See `pallas_kernels.kv_write`."""
    # Page, head and offset are indexed together: a slice over heads would make XLA copy the pool inside
    # loops.
    head = jnp.arange(k_pages.shape[1])[None, :]
    slot = (page_ids[:, None], head, offsets[:, None])
    return (
        k_pages.at[slot].set(k_new.astype(k_pages.dtype), mode="drop"),
        v_pages.at[slot].set(v_new.astype(v_pages.dtype), mode="drop"),
    )
