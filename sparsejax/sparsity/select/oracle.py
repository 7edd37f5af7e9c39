"""The pages to which dense attention gives most probability: the best that selection by page could do."""

from __future__ import annotations

from jaxtyping import Array, Float

import pallas_kernels
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select.query import Query


def scores(query: Query, policy: PolicyRows) -> Float[Array, "B K S"]:
    """Attention probability of each page, summed over the query heads of a KV head. Reads every page."""
    lists = (query.page_ids, query.counts, query.lengths)
    pools = (query.k_pages, query.v_pages)
    _, lse = pallas_kernels.paged_decode_attention(query.q, *pools, *lists, return_lse=True, **query.options)
    options = {name: value for name, value in query.options.items() if name != "implementation"}
    return pallas_kernels.attention_mass(query.q, query.k_pages, *lists, lse, **options)
