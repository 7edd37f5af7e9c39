"""Attention that observed queries gave to each token: what SnapKV scores and others build on."""

from __future__ import annotations

from jaxtyping import Array, Float

import pallas_kernels
from sparsejax.models.rope import apply_rope
from sparsejax.sparsity.keep.view import View, smooth


def window_attention(view: View) -> Float[Array, "K U"]:
    """Probability that the last queries give to each token: the mean over the query heads of a KV head, summed
    over the queries and averaged over neighbouring tokens."""
    queries = apply_rope(view.queries, *view.rope(view.positions))
    pages = view.page_ids[None, None], -(-view.length // view.page_size)[None, None], view.length[None]
    given = pallas_kernels.window_scores(queries[None], view.k_pages, *pages, group="mean", **view.options)
    return smooth(given[0].reshape(given.shape[1], -1), view.pool)
