"""The newest pages: with sinks, what StreamingLLM reads (Xiao et al., arXiv 2309.17453)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select.query import Query


def scores(query: Query, policy: PolicyRows) -> Float[Array, "1 1 S"]:
    """Later pages first."""
    return jnp.arange(query.page_ids.shape[2], dtype=jnp.float32)[None, None]
