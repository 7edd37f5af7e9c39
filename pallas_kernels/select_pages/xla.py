"""`select_pages` in XLA: bisection for the score of the last selected page, on the bits of the scores.

A sort of every list costs more on every platform, and TPUs do not lower a stable top-k.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
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
    listed, pinned, amount = terms(scores, counts, budgets, width, sinks, recents)
    keys = jnp.where(pinned, jnp.inf, scores)
    keys = jnp.where(listed, _ordered(keys), 0)
    bound = _largest_bound(keys, amount)[..., None]
    above, equal = keys > bound, (keys == bound) & listed
    missing = amount - above.sum(-1)
    chosen = above | (equal & (jnp.cumsum(equal, axis=-1) <= missing[..., None]))
    return gathered(_places(chosen, width), amount, page_ids, logical_ids)


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
