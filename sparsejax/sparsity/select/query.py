"""What a select may look at."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels


class Query(NamedTuple):
    """One decode query per row, ``q [B, H, D]`` rotated, and the pages it may read.

    Attributes:
        page_ids: physical ids ``[B, Kl, S]``; the first `counts` ``[B, Kl]`` are the row's. Kl is 1, but K where lists
            of candidates differ by KV head.
        lengths: tokens of each row, the query's own included.
        bounds: key bounds of sealed pages ``[N, K, 2D]``; None unless a declared select needs them.
        options: `window`, `soft_cap` and `implementation` of the layer's attention.
        lse: log-sum-exp ``[B, H]`` of attention over all pages, for rows whose select reads all of them.
        logical_ids: of candidates, their indices in the sequence; None where all pages are listed in order.
        scales: of coded pages, whose `k_pages` and `v_pages` are codes; the open page is not among those. None
            where pages are dense.
    """

    q: Array
    k_pages: Array
    v_pages: Array | None
    bounds: Array | None
    page_ids: Array
    counts: Array
    lengths: Array
    options: dict[str, Any]
    lse: Array | None = None
    logical_ids: Array | None = None
    scales: Array | None = None


def probability(query: Query, group: str) -> Float[Array, "B K S"]:
    """Attention probability of each page, reduced over the query heads of a KV head by `group`.

    Where pages are coded the open one gets 0: it is read in any case.
    """
    counts = query.counts if query.scales is None else jnp.maximum(query.counts - 1, 0)
    options = {name: value for name, value in query.options.items() if name != "implementation"}
    return pallas_kernels.attention_mass(
        query.q,
        query.k_pages,
        query.page_ids,
        counts,
        query.lengths,
        query.lse,
        scales=query.scales,
        group=group,
        **options,
    )
