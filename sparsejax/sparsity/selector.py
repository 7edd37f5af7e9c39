"""Rewrites the page lists of a decode step: each row reads what its own policy selects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from sparsejax.cache.layout import DenseLayout, Pools
from sparsejax.sparsity.policy import NEEDS_BOUNDS, SELECTS, SparsityConfig
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select import SCORES, Query


@dataclass(frozen=True)
class Selector:
    """The selects that an engine declared, besides ``all``: a static part of every compiled step."""

    selects: tuple[str, ...]
    page_size: int

    @classmethod
    def of(cls, policies: tuple[SparsityConfig, ...], page_size: int) -> Selector | None:
        """The selector that serves `policies`; None if all of them read everything."""
        names = {policy.select for policy in policies} - {"all"}
        return cls(tuple(name for name in SELECTS if name in names), page_size) if names else None

    def initial_bounds(self, layout: DenseLayout) -> Float[Array, "N K X"] | None:
        """Empty key bounds of one layer, if a declared select reads them. Pages not sealed yet must be finite."""
        if not NEEDS_BOUNDS & set(self.selects):
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
        return self.seal_pages(bounds, pools, full)

    def seal_pages(
        self, bounds: Float[Array, "N K X"] | None, pools: Pools, page_ids: Int[Array, " S"]
    ) -> Array | None:
        """Takes in the bounds of full pages; page 0 fills the list."""
        return None if bounds is None else pallas_kernels.page_bounds(bounds, pools[0], page_ids)

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
        for name in self.selects:
            mine = policy.kind == SELECTS.index(name)

            def scored(scores: Array, mine: Array = mine, name: str = name) -> Array:
                given = SCORES[name](query, policy)
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
