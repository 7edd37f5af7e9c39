"""What every way to select shares: which pages are pinned, how many are selected, and lists of the chosen."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array


class Terms(NamedTuple):
    """Of each list: its entries [B, Ks, S] that are listed and pinned, and how many are selected [B, Ks]."""

    listed: Array
    pinned: Array
    amount: Array


def terms(
    scores: Array, counts: Array, budgets: Array, width: int, sinks: Array | None, recents: Array | None
) -> Terms:
    """What `select_pages` pins and selects; pinned pages that the width does not hold are not pinned."""
    rows, lists, pages = scores.shape
    counts = jnp.broadcast_to(counts, (rows, lists))
    budgets = budgets if budgets.ndim == 2 else budgets[:, None]
    recent = jnp.minimum(1 if recents is None else recents[:, None], jnp.minimum(counts, width))
    sink = jnp.minimum(0 if sinks is None else sinks[:, None], jnp.minimum(counts, width) - recent)
    entry = jnp.arange(pages)
    listed = entry < counts[..., None]
    pinned = listed & ((entry < sink[..., None]) | (entry >= (counts - recent)[..., None]))
    return Terms(listed, pinned, jnp.clip(budgets, sink + recent, jnp.minimum(counts, width)))


def gathered(
    entries: Array, amount: Array, page_ids: Array, logical_ids: Array | None
) -> tuple[Array, Array, Array]:
    """Lists of the chosen entries [B, Ks, J], of which the first `amount` count."""
    chosen = jnp.arange(entries.shape[2]) < amount[..., None]
    entries = jnp.where(chosen, entries, 0)

    def take(lists: Array) -> Array:
        lists = jnp.broadcast_to(lists, (*entries.shape[:2], lists.shape[2]))
        return jnp.where(chosen, jnp.take_along_axis(lists, entries, axis=2), 0)

    return take(page_ids), entries if logical_ids is None else take(logical_ids), amount
