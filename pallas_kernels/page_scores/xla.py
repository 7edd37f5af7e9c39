"""`page_scores` in XLA: a loop over rows, in it products of blocks of bounds with the row's queries."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.groups import HIDDEN, reduce_group
from pallas_kernels.page_scores.queries import beside, split
from pallas_kernels.pages import batched

# Pages of a block: a row takes as many large ones as it fills, then small ones. For 4 rows of 2048 pages (H 12, K 4,
# D 64, bfloat16, each layer with bounds of its own) blocks of 2048 and 512 take 0.68 and 0.79 of the time of 256.
LARGE, SMALL = 2048, 256


def page_scores(
    q: Array, bounds: Array, page_ids: Array, counts: Array, *, group: str = "max", scale: float
) -> Array:
    """See `pallas_kernels.page_scores`."""
    rows = q.shape[0]
    _, kv_heads, minor = bounds.shape
    small = min(SMALL, page_ids.shape[2])
    lists = jnp.pad(page_ids, ((0, 0), (0, 0), (0, -page_ids.shape[2] % small)))
    queries = beside(q, kv_heads, minor, group) * scale
    # Multiplied as the bounds are stored: a float32 copy of every block costs more than twice the queries.
    parts = [queries] if bounds.dtype == jnp.float32 else split(queries, bounds.dtype)
    queries, members = jnp.concatenate(parts, axis=2), queries.shape[2]
    head = jnp.arange(kv_heads)[:, None]

    def one_row(row: Array, scores: Array) -> Array:
        def block(size: int, first: Array, i: Array, scores: Array) -> Array:
            start = first + i * size
            listed = start + jnp.arange(size) < counts[row][:, None]  # [Kl, size]
            ids = lax.dynamic_slice(lists, (row, 0, start), (1, lists.shape[1], size))[0]
            tiles = bounds.at[jnp.where(listed, ids, 0), head].get(mode="promise_in_bounds")
            # The few queries come second: the other way round the tiles would be transposed first.
            products = batched("ksd,kgd->ksg", tiles, queries[row])
            bound = sum(products[..., i * members : (i + 1) * members] for i in range(len(parts)))
            bound = jnp.where(listed, reduce_group(bound, group, axis=2), HIDDEN)
            return lax.dynamic_update_slice(scores, bound[None], (row, 0, start))

        count, first = counts[row].max(), jnp.int32(0)
        if lists.shape[2] >= LARGE:
            first = count // LARGE * LARGE
            scores = lax.fori_loop(0, first // LARGE, lambda i, scores: block(LARGE, 0, i, scores), scores)
        blocks = (count - first + small - 1) // small
        return lax.fori_loop(0, blocks, lambda i, scores: block(small, first, i, scores), scores)

    scores = jnp.full((rows, kv_heads, lists.shape[2]), HIDDEN)
    return lax.fori_loop(0, rows, one_row, scores)[:, :, : page_ids.shape[2]]
