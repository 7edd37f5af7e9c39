"""Every n-th page, with sinks and recents: skip connections into the past (Child et al., arXiv 1904.10509)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select.query import Query


def scores(query: Query, policy: PolicyRows) -> Float[Array, "B 1 S"]:
    """Multiples of the stride, later ones first where the budget does not hold all; no others."""
    page = jnp.arange(query.page_ids.shape[2])
    return jnp.where(page % policy.stride[:, None] == 0, page.astype(jnp.float32), -jnp.inf)[:, None]
