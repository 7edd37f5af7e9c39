"""R-KV (Cai et al., arXiv 2505.24133): what recent queries attend to, less what the cache holds many times.

The paper compares every pair of keys and spares the newest of a group of similar ones. Here a token's redundancy is
its cosine with the mean unit key: its mean cosine with all keys over the length of that mean, in one pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.sparsity.keep.keydiff import likeness
from sparsejax.sparsity.keep.observed import window_attention
from sparsejax.sparsity.keep.view import View, live_tokens

IMPORTANCE = 0.1
"""Weight of attention against redundancy, the paper's lambda."""


def scores(view: View) -> Float[Array, "K U"]:
    """Attention and redundancy, each as shares of the row's tokens."""
    attention = window_attention(view)
    attention = attention / jnp.maximum(attention.sum(-1, keepdims=True), 1e-9)
    redundancy = jax.nn.softmax(jnp.where(live_tokens(view), likeness(view), -jnp.inf), axis=-1)
    return IMPORTANCE * attention - (1 - IMPORTANCE) * redundancy
