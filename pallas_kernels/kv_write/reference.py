"""`kv_write` in plain jnp: every pool slot looks for the token that names it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import layouts


def kv_write(
    k_pages: Array, v_pages: Array | None, k_new: Array, v_new: Array, page_ids: Array, offsets: Array
) -> tuple[Array, Array | None]:
    """See `pallas_kernels.kv_write`."""
    if not k_new.shape[0]:
        return k_pages, v_pages
    pages, _, page_size, _ = k_pages.shape
    slots = (jnp.arange(pages)[:, None] * page_size + jnp.arange(page_size))[None]
    named = (page_ids * page_size + offsets)[:, None, None] == slots  # [T, N, P]
    token, written = jnp.argmax(named, axis=0), named.any(axis=0)  # [N, P]

    def write(pool: Array, new: Array) -> Array:
        values = new[token].swapaxes(1, 2).astype(pool.dtype)  # [N, K, P, D]
        return jnp.where(written[:, None, :, None], values, pool)

    k_new, v_new = layouts.pack(k_new, v_new, k_pages.shape[-1], 1 if v_pages is None else 2)
    return write(k_pages, k_new), None if v_pages is None else write(v_pages, v_new)
