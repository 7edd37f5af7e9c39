"""`select_pages` by sorting: every list by score, then the selected entries by place."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.select_pages.pinned import gathered, terms


def select_pages(
    scores: Array,
    page_ids: Array,
    counts: Array,
    budgets: Array,
    *,
    width: int,
    sinks: Array | None = None,
    recents: Array | None = None,
    logical_ids: Array | None = None,
) -> tuple[Array, Array, Array]:
    """See `pallas_kernels.select_pages`."""
    pages = scores.shape[2]
    listed, pinned, amount = terms(scores, counts, budgets, width, sinks, recents)
    keys = jnp.where(listed, jnp.where(pinned, jnp.inf, scores), -jnp.inf)
    best = jnp.argsort(keys, axis=2, descending=True, stable=True)
    if pages < width:
        best = jnp.pad(best, ((0, 0), (0, 0), (0, width - pages)))
    chosen = jnp.arange(width) < amount[..., None]
    entries = jnp.sort(jnp.where(chosen, best[..., :width], pages), axis=2)
    return gathered(entries, amount, page_ids, logical_ids)
