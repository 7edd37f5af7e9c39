"""`paged_prefill_attention` as decode attention of every token on its own, with its row's page list."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.paged_decode_attention.reference import paged_decode_attention


def paged_prefill_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    query_starts: Array,
    *,
    logical_ids: Array | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.paged_prefill_attention`."""
    row, visible = owners(q.shape[0], lengths, query_starts)
    return paged_decode_attention(
        q,
        k_pages,
        v_pages,
        page_ids[row],
        counts[row],
        visible,
        logical_ids=None if logical_ids is None else logical_ids[row],
        **options,
    )


def owners(tokens: int, lengths: Array, query_starts: Array) -> tuple[Array, Array]:
    """The row of each of T tokens of a ragged chunk, and how many tokens it sees, itself included; 0 if it has none."""
    token = jnp.arange(tokens)
    row = jnp.searchsorted(query_starts, token, side="right") - 1
    owned = (row >= 0) & (row < lengths.shape[0])
    row = jnp.clip(row, 0, lengths.shape[0] - 1)
    return row, jnp.where(owned, lengths[row] - (query_starts[row + 1] - token) + 1, 0)
