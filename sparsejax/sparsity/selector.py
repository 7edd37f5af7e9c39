"""Rewrites the page lists of a decode step: each row reads what its own policy selects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from sparsejax.cache.layout import DenseLayout, Pools
from sparsejax.sparsity.kinds import ALL, Select
from sparsejax.sparsity.policy import SparsityConfig, selects_of
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select import SCORES, Query


@dataclass(frozen=True)
class Selector:
    """The selects that an engine declared, after ``all``: a static part of every compiled step."""

    selects: tuple[Select, ...]
    page_size: int

    @classmethod
    def of(cls, policies: tuple[SparsityConfig, ...], page_size: int) -> Selector | None:
        """The selector that serves `policies`; None if all of them read everything."""
        selects = selects_of(policies)
        return None if selects == (ALL,) else cls(selects, page_size)

    def initial_bounds(self, layout: DenseLayout) -> Float[Array, "N K X"] | None:
        """Empty key bounds of one layer, if a declared select reads them. Pages not sealed yet must be finite."""
        if not any(kind.bounds for kind in self.selects):
            return None
        return jnp.zeros((layout.num_pages, layout.num_kv_heads, 2 * layout.head_dim), layout.dtype)

    def seal(
        self,
        bounds: Float[Array, "N K X"] | None,
        pools: Pools,
        page_ids: Int[Array, " T"],
        offsets: Int[Array, " T"],
        decode_rows: int,
    ) -> Array | None:
        """Takes in the bounds of the pages whose last slot is among the T tokens that were just written."""
        if bounds is None:
            return None
        most = min(len(page_ids), len(page_ids) // self.page_size + decode_rows)
        full = lax.top_k(jnp.where(offsets == self.page_size - 1, page_ids, 0), most)[0]
        return pallas_kernels.page_bounds(bounds, pools[0], full)

    def select(
        self,
        q: Float[Array, "B H D"],
        pools: Pools,
        bounds: Float[Array, "N K X"] | None,
        page_ids: Int[Array, "B 1 S"],
        counts: Int[Array, "B 1"],
        lengths: Int[Array, " B"],
        policy: PolicyRows,
        options: dict[str, Any],
    ) -> pallas_kernels.Selection:
        """Physical and logical ids of the pages that each row reads, per KV head, and their counts.

        A select that no row of the batch uses costs nothing.
        """
        query = Query(q, *pools, bounds, page_ids, counts, lengths, options)
        scores = jnp.zeros((q.shape[0], pools[0].shape[1], page_ids.shape[2]))
        for place, kind in enumerate(self.selects[1:], start=1):
            mine = policy.kind == place

            def scored(scores: Array, mine: Array = mine, kind: Select = kind) -> Array:
                given = (kind.function or SCORES[kind.name])(query, policy)
                return jnp.where(mine[:, None, None], given.astype(scores.dtype), scores)

            scores = lax.cond(mine.any(), scored, lambda scores: scores, scores)
        return pallas_kernels.select_pages(
            scores,
            page_ids,
            counts,
            policy.budget,
            width=page_ids.shape[2],
            sinks=policy.sinks,
            recents=policy.recents,
        )
