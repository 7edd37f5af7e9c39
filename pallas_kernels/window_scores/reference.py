"""`window_scores` in plain jnp: the log-sum-exp of the last queries, then the mass that they give."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.attention_mass.reference import attention_mass
from pallas_kernels.paged_prefill_attention.reference import paged_prefill_attention


def window_scores(
    q: Array,
    k_pages: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    *,
    sinks: Array | None = None,
    group: str = "mean",
    **options: object,
) -> Array:
    """See `pallas_kernels.window_scores`."""
    rows, size, _, head_dim = q.shape
    keys = k_pages[..., :head_dim]
    starts = size * jnp.arange(rows + 1)
    position = lengths[:, None] - size + jnp.arange(size)
    flat = jnp.where((position >= 0)[..., None, None], q, 0).reshape(-1, *q.shape[2:])
    lists = (page_ids, counts, lengths)
    _, lse = paged_prefill_attention(
        flat, keys, keys, *lists, starts, sinks=sinks, return_lse=True, **options
    )
    return attention_mass(flat, keys, *lists, lse, starts, group=group, per_token=True, **options)
