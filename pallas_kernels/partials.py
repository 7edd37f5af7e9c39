"""Attention over parts of a sequence, put together."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.groups import HIDDEN

type Partial = tuple[Float[Array, "T H D"], Float32[Array, "T H"]]


def merge_partials(*parts: Partial) -> Partial:
    """What attention over all tokens together gives, from (out, log-sum-exp) over disjoint sets of tokens.

    So a row reads its sealed pages as codes and its open page raw. A part that sees nothing (-1e30) adds nothing;
    where none sees anything the result is zeros and -1e30. Attention sinks belong to exactly one part.
    """
    dtype = parts[0][0].dtype
    lses = jnp.stack([lse for _, lse in parts])
    top = lses.max(0)
    weights = jnp.where(lses > HIDDEN / 2, jnp.exp(lses - top), 0)  # [parts, T, H]
    total = weights.sum(0)
    sees = total > 0
    shares = (weights / jnp.where(sees, total, 1))[..., None]
    out = sum(share * out.astype(jnp.float32) for share, (out, _) in zip(shares, parts, strict=True))
    return out.astype(dtype), jnp.where(sees, top + jnp.log(jnp.where(sees, total, 1)), HIDDEN)
