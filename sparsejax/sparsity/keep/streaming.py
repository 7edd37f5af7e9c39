"""StreamingLLM (Xiao et al., arXiv 2309.17453): sinks and the newest tokens.

Tokens keep their true positions; the paper numbers the tokens of its window anew.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.sparsity.keep.view import View


def scores(view: View) -> Float[Array, "1 U"]:
    """Later tokens first."""
    return jnp.arange(view.page_ids.shape[0] * view.page_size, dtype=jnp.float32)[None]
