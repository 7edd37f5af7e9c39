"""What a select may look at."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Array


class Query(NamedTuple):
    """One decode query per row, ``q [B, H, D]`` rotated, and the pages it may read.

    Attributes:
        page_ids: physical ids ``[B, 1, S]`` by logical index; `counts` ``[B, 1]`` of them are the row's.
        lengths: tokens of each row, the query's own included.
        bounds: key bounds of sealed pages ``[N, K, 2D]``; None unless a declared select needs them.
        options: `window`, `soft_cap` and `implementation` of the layer's attention.
        scales: of coded pages, whose `k_pages` and `v_pages` are codes; None where they are dense. The open page
            of a row is not among coded ones.
    """

    q: Array
    k_pages: Array
    v_pages: Array | None
    bounds: Array | None
    page_ids: Array
    counts: Array
    lengths: Array
    options: dict[str, Any]
    scales: Array | None = None
