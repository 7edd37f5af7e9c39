"""The pages to which dense attention gives most probability: the best that selection by page could do."""

from __future__ import annotations

from jaxtyping import Array, Float

from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select.query import Query, probability


def scores(query: Query, policy: PolicyRows) -> Float[Array, "B K S"]:
    """Attention probability of each page, summed over the query heads of a KV head. Reads every page."""
    return probability(query, "sum")
