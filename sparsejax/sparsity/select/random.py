"""A fixed random subset of each request's pages, the same in every layer: what any method must beat."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select.query import Query


def scores(query: Query, policy: PolicyRows) -> Float[Array, "B 1 S"]:
    """A number per page that depends on the seed and on the page's index only."""
    width = query.page_ids.shape[2]

    def row(seed: Array) -> Array:
        return jax.random.uniform(jax.random.key(seed), (1, width))

    return jax.vmap(row)(policy.seed)
