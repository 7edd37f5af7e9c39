"""`kv_write` as one scatter per pool."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import layouts


def kv_write(
    k_pages: Array, v_pages: Array | None, k_new: Array, v_new: Array, page_ids: Array, offsets: Array
) -> tuple[Array, Array | None]:
    """See `pallas_kernels.kv_write`."""
    k_new, v_new = layouts.pack(k_new, v_new, k_pages.shape[-1], 1 if v_pages is None else 2)
    # Page, head and offset are indexed together: a slice over heads would make XLA copy the pool inside
    # loops.
    head = jnp.arange(k_pages.shape[1])[None, :]
    slot = (page_ids[:, None], head, offsets[:, None])

    def write(pool: Array, new: Array) -> Array:
        return pool.at[slot].set(new.astype(pool.dtype), mode="drop")

    return write(k_pages, k_new), None if v_pages is None else write(v_pages, v_new)
