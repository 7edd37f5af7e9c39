"""A random subset of each prompt's tokens: what any method must beat."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from sparsejax.sparsity.keep.view import View


def scores(view: View) -> Float[Array, "1 U"]:
    """A number per token that depends on its slot and on how many tokens there are."""
    key = jax.random.fold_in(jax.random.key(0), view.length)
    return jax.random.uniform(key, (1, view.page_ids.shape[0] * view.page_size))
