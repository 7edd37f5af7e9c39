"""How far sparse attention is from dense attention on the same queries: pure functions of arrays, for any model.

They say what a policy loses before an answer is wrong, and they do not replace answers: a model with flat attention
overstates what selection loses, a model with a few strong keys hides it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

HIDDEN = -1e30


def attention_weights(
    q: Float[Array, "B H D"], k: Float[Array, "T K D"], visible: Bool[Array, "B T"], soft_cap: float | None = None
) -> Float[Array, "B H T"]:
    """Exact attention probabilities of each query over the tokens that it may see, in float32."""
    rows, heads, dim = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, dim)
    scores = jnp.einsum("bkgd,tkd->bkgt", grouped, k, precision=lax.Precision.HIGHEST).astype(jnp.float32) * dim**-0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, HIDDEN), axis=-1)
    return weights.reshape(rows, heads, -1)


def mixed(weights: Float[Array, "B H T"], v: Float[Array, "T K D"]) -> Float[Array, "B H D"]:
    """The attention output that probabilities give."""
    grouped = weights.reshape(weights.shape[0], v.shape[1], -1, weights.shape[2])
    out = jnp.einsum("bkgt,tkd->bkgd", grouped, v.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return out.reshape(*weights.shape[:2], -1)


def restricted(
    weights: Float[Array, "B H T"], kept: Bool[Array, "B K T"]
) -> tuple[Float[Array, "B H T"], Float[Array, "B H"]]:
    """Probabilities over the kept tokens alone, and their mass recall: the share of dense attention that is kept.

    The output moves by at most ``(1 - recall)`` times the largest distance between two values, so recall is a
    certificate.
    """
    mine = jnp.where(jnp.repeat(kept, weights.shape[1] // kept.shape[1], axis=1), weights, 0.0)
    recall = mine.sum(-1)
    return mine / jnp.maximum(recall, 1e-30)[..., None], jnp.minimum(recall, 1.0)


def output_error(sparse: Float[Array, "B H D"], dense: Float[Array, "B H D"]) -> Float[Array, "B H"]:
    """Distance of two attention outputs over the length of the dense one."""
    return jnp.linalg.norm(sparse - dense, axis=-1) / jnp.maximum(jnp.linalg.norm(dense, axis=-1), 1e-30)


def divergence(dense: Float[Array, "B V"], sparse: Float[Array, "B V"]) -> Float[Array, " B"]:
    """KL(dense || sparse) of next-token distributions from their logits, in nats."""
    log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in (dense, sparse))
    return jnp.maximum((jnp.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)


def first_divergence(dense: Sequence[int], sparse: Sequence[int]) -> int | None:
    """Index of the first token in which two greedy replies differ; None where they are alike."""
    pairs = zip(dense, sparse, strict=True)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), None)
