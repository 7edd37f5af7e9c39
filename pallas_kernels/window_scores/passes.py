"""`window_scores` in two passes over the keys: the log-sum-exp of the last queries, then the mass that they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def two_passes(
    prefill: Callable[..., Any],
    mass: Callable[..., Array],
    q: Array,
    k_pages: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    *,
    sinks: Array | None,
    group: str,
    **options: Any,
) -> Array:
    """`window_scores` by the `paged_prefill_attention` and `attention_mass` of a backend. Keys pass for values."""
    rows, size = q.shape[:2]
    starts = size * jnp.arange(rows + 1, dtype=jnp.int32)
    position = lengths[:, None] - size + jnp.arange(size)
    flat = jnp.where((position >= 0)[..., None, None], q, 0).reshape(-1, *q.shape[2:])
    lists = (page_ids, counts, lengths)
    _, lse = prefill(flat, k_pages, k_pages, *lists, starts, sinks=sinks, return_lse=True, **options)
    return mass(flat, k_pages, *lists, lse, starts, group=group, per_token=True, **options)
