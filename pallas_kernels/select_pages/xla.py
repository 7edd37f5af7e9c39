"""`select_pages` in XLA: the largest scores by a partial sort on CPUs, by bisection elsewhere.

Bisection finds the score of the last selected page on the bits of the scores. It takes 32 passes over them, which
a GPU and a TPU do at once; TPUs do not lower a stable top-k. A CPU sorts the few pages of a list in less: 0.24 against
0.36 ms for 64 of 2048 pages in 16 lists, on one core.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.select_pages.pinned import Terms, gathered, terms


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
    given = terms(scores, counts, budgets, width, sinks, recents)
    keys = jnp.where(given.pinned, jnp.inf, scores)
    entries = lax.platform_dependent(keys, given, cpu=_sorted(width), default=_bisected(width))
    return gathered(entries, given.amount, page_ids, logical_ids)


def _sorted(width: int):
    """The selected entries ascending, [.., J]; past the amount anything."""

    def entries(keys: Array, given: Terms) -> Array:
        pages = keys.shape[2]
        keys = jnp.where(given.listed, jnp.where(keys == 0, 0, keys), -jnp.inf)
        # Entries that are not listed come after those that are and score -inf too: equal keys stay in order.
        best = lax.top_k(keys, min(width, pages))[1]
        best = jnp.pad(best, ((0, 0), (0, 0), (0, width - best.shape[2])))
        return jnp.sort(jnp.where(jnp.arange(width) < given.amount[..., None], best, pages), axis=2)

    return entries


def _bisected(width: int):
    """As `_sorted`."""

    def entries(keys: Array, given: Terms) -> Array:
        keys = jnp.where(given.listed, _ordered(keys), 0)
        bound = _largest_bound(keys, given.amount)[..., None]
        above, equal = keys > bound, (keys == bound) & given.listed
        missing = given.amount - above.sum(-1)
        chosen = above | (equal & (jnp.cumsum(equal, axis=-1) <= missing[..., None]))
        return _places(chosen, width)

    return entries


def _ordered(scores: Array) -> Array:
    """Unsigned integers above 0 in the order of the scores, both zeros the same."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _largest_bound(keys: Array, amount: Array) -> Array:
    """The largest number that at least `amount` keys of a list reach, bit by bit from the highest."""

    def step(i: Array, bound: Array) -> Array:
        higher = bound | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where((keys >= higher[..., None]).sum(-1) >= amount, higher, bound)

    return lax.fori_loop(0, 32, step, jnp.zeros(amount.shape, jnp.uint32))


def _places(chosen: Array, width: int) -> Array:
    """The entries that are chosen, ascending, [.., J]; past them anything."""
    before = jnp.cumsum(chosen, axis=-1)
    search = jax.vmap(jax.vmap(lambda sums: jnp.searchsorted(sums, jnp.arange(1, width + 1))))
    return search(before)
