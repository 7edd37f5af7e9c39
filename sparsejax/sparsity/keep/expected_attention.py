"""Expected Attention (Devoto et al., arXiv 2510.00636): attention that queries to come would give, from the
statistics of queries so far. It looks at no particular query, so what it keeps can be shared.

The paper's mean and covariance run over all queries; here they run over a sample spread evenly over the prompt,
which needs no D x D state: the variance of a key's score is the mean square of its products with the sample.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.models.rope import apply_rope
from sparsejax.sparsity.keep.view import View, by_token, live_tokens

HORIZON = 512
"""Positions to come over which the rotation is averaged."""


def scores(view: View) -> Float[Array, "K U"]:
    """Expected probability of each token times the length of its value, the mean over a KV head's query heads."""
    kv_heads, groups, head_dim = view.k_pages.shape[1], view.groups, view.head_dim
    mean, spread = _queries(view)
    mean, spread = (x.reshape(*x.shape[:-2], kv_heads, groups, head_dim) for x in (mean, spread))
    scale = head_dim**-0.5

    def expected_score(k: Array, v: Array) -> Array:
        middle = jnp.einsum("kgd,knd->kgn", mean, k) * scale
        variance = jnp.square(jnp.einsum("wkgd,knd->wkgn", spread, k) * scale).sum(0)
        return (middle + variance / 2).reshape(kv_heads * groups, -1)

    expected = by_token(view, expected_score, kv_heads * groups)
    given = jax.nn.softmax(jnp.where(live_tokens(view), expected, -jnp.inf), axis=-1)
    lengths = by_token(view, lambda k, v: jnp.linalg.norm(v, axis=-1), kv_heads)
    return given.reshape(kv_heads, groups, -1).mean(1) * lengths


def _queries(view: View) -> tuple[Float[Array, "H D"], Float[Array, "W H D"]]:
    """Mean of the sample and its deviations over the root of their number, turned as future positions would."""
    seen = (view.positions >= 0)[:, None, None]
    count = jnp.maximum(seen.sum(), 1)
    queries = jnp.where(seen, view.queries.astype(jnp.float32), 0)
    mean = queries.sum(0) / count
    spread = jnp.where(seen, queries - mean, 0) * jax.lax.rsqrt(count.astype(jnp.float32))
    cos, sin = (table.mean(0) for table in view.rope(view.future + jnp.arange(HORIZON)))
    turned = apply_rope(
        jnp.concatenate([mean[None], spread]), *(jnp.broadcast_to(t, (len(spread) + 1, len(t))) for t in (cos, sin))
    )
    return turned[0], turned[1:]

