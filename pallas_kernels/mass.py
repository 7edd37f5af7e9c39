"""Probability mass of the queries of one row in XLA, added to what its entries hold."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.blockwise import Block, Queries, over_blocks
from pallas_kernels.groups import reduce_group
from pallas_kernels.pages import Pages


def nothing(pages: Pages, per_token: bool) -> Array:
    """Zeros [B, K, S] or [B, K, S, P], with S as the lists are padded."""
    rows, _, width = pages.page_ids.shape
    kv_heads = pages.k_pages.shape[1]
    return jnp.zeros((rows, kv_heads, width, pages.page_size) if per_token else (rows, kv_heads, width))


def add(total: Array, queries: Queries, lse: Array, pages: Pages, groups: int, group: str) -> Array:
    """Adds the mass of M = tokens * `groups` queries under `lse` [K, M] to the row's part of `total`."""
    kv_heads, size, per_token = total.shape[1], pages.page_size, total.ndim == 4

    def body(block: Block, total: Array) -> Array:
        given = jnp.exp(jnp.where(block.seen, block.scores - lse[..., None], -jnp.inf))
        given = given.reshape(kv_heads, -1, groups, block.size, size)
        given = reduce_group(given if per_token else given.sum(-1), group, axis=2).sum(1)[None]
        at = (queries.row, 0, block.start, 0)[: total.ndim]
        return lax.dynamic_update_slice(total, lax.dynamic_slice(total, at, given.shape) + given, at)

    return over_blocks(queries, pages, body, total)
