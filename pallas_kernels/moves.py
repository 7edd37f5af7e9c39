"""Work on whole pages, listed as sources and targets: what bounds, coding and opening of pages share."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import codes

type Pools = tuple[Array | None, ...]
type Transform = Callable[..., Pools]

BLOCK = 16  # pages that a step of the loop moves


def everywhere(
    transform: Transform, into: Pools, out_of: Pools, page_ids: Array, targets: Array, count: Array | None
) -> Pools:
    """Transforms every source page, then every target page looks for the list item that names it."""
    items = page_ids.shape[0]
    if not items:
        return into
    counts = jnp.arange(items) < (items if count is None else count)

    def assign(pool: Array | None, new: Array | None) -> Array | None:
        if pool is None:
            return None
        named = counts[:, None] & (targets[:, None] == jnp.arange(pool.shape[0]))  # [S, N]
        source = page_ids[jnp.argmax(named, axis=0)]
        named = named.any(0).reshape(-1, *(1,) * (pool.ndim - 1))
        return jnp.where(named, new[source], pool)

    return tuple(assign(pool, new) for pool, new in zip(into, transform(*out_of), strict=True))


def in_blocks(
    transform: Transform, into: Pools, out_of: Pools, page_ids: Array, targets: Array, count: Array | None
) -> Pools:
    """A loop over blocks of the first `count` items: gathers source pages, transforms them, scatters them."""
    items = page_ids.shape[0]
    if not items:
        return into
    size = min(BLOCK, items)
    padding = (0, -items % size)
    page_ids, targets = jnp.pad(page_ids, padding), jnp.pad(targets, padding)
    count = jnp.int32(items) if count is None else jnp.minimum(count, items)

    def step(i: Array, into: Pools) -> Pools:
        item = i * size + jnp.arange(size)
        counts = item < count
        ids = jnp.where(counts, lax.dynamic_slice(page_ids, (i * size,), (size,)), 0)
        to = lax.dynamic_slice(targets, (i * size,), (size,))
        new = transform(*(None if pool is None else _gathered(pool, ids) for pool in out_of))

        def store(pool: Array | None, pages: Array | None) -> Array | None:
            if pool is None:
                return None
            # Page and head are indexed together, as in `kv_write`; items past the count fall outside.
            at = (jnp.where(counts, to, pool.shape[0])[:, None], jnp.arange(pool.shape[1]))
            return codes.from_bytes(codes.as_bytes(pool).at[at].set(codes.as_bytes(pages), mode="drop"), pool.dtype)

        return tuple(store(pool, pages) for pool, pages in zip(into, new, strict=True))

    return lax.fori_loop(0, (count + size - 1) // size, step, into)


def _gathered(pool: Array, ids: Array) -> Array:
    """Pages `ids` of a pool."""
    return codes.from_bytes(codes.as_bytes(pool)[ids], pool.dtype)
