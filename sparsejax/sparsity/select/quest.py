"""Quest (Tang et al., arXiv 2406.10774): pages by an upper bound of the query's scores with their keys."""

from __future__ import annotations

from jaxtyping import Array, Float

import pallas_kernels
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select.query import Query


def scores(query: Query, policy: PolicyRows) -> Float[Array, "B K S"]:
    """Per KV head the largest bound among its query heads. The open page has no bounds; it is pinned."""
    return pallas_kernels.page_scores(query.q, query.bounds, query.page_ids, query.counts, group="max")
