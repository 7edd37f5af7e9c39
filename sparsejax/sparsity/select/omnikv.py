"""OmniKV (Hao et al., ICLR 2025): layers attend alike, so few of them find for the others what matters."""

from __future__ import annotations

from jaxtyping import Array, Float

from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select.query import Query, probability


def scores(query: Query, policy: PolicyRows) -> Float[Array, "B 1 S"]:
    """The largest attention probability that any head gives to each page. Reads every page."""
    return probability(query, "max").max(1, keepdims=True)
