"""H2O (Zhang et al., arXiv 2306.14048): tokens that have been given most attention by all queries so far."""

from __future__ import annotations

from jaxtyping import Array, Float

from sparsejax.sparsity.keep.view import View


def scores(view: View) -> Float[Array, "K U"]:
    """Probability summed over the query heads of a KV head and over every query since the token came in."""
    return view.mass
