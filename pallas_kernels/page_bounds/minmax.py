"""Smallest and largest keys of pages, cast so that they stay bounds."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import codes


def minmax(k_pages: Array, scales: Array | None, width: int, dtype: Any) -> Array:
    """Minima beside maxima [.., width] over the tokens of pages as stored, dense or coded, in `dtype`."""
    keys = codes.keys(k_pages, scales, width // 2)
    return jnp.concatenate([_rounded(keys.min(-2), dtype, -1), _rounded(keys.max(-2), dtype, 1)], axis=-1)


def _rounded(bound: Array, dtype: Any, sign: int) -> Array:
    """`bound` float32 in `dtype`, the nearest value that is not inwards of it."""
    if dtype == jnp.bfloat16:
        # The low bits are cut off, which moves towards zero, or filled up before where that is inwards.
        bits = lax.bitcast_convert_type(bound, jnp.int32) + jnp.where(sign * bound > 0, 0xFFFF, 0)
        return lax.bitcast_convert_type(bits & ~0xFFFF, jnp.float32).astype(dtype)
    cast = bound.astype(dtype)
    if jnp.finfo(dtype).bits >= 32:
        return cast
    inside = sign * (cast.astype(jnp.float32) - bound) < 0
    return jnp.where(inside, jnp.nextafter(cast, jnp.asarray(sign * jnp.inf, dtype)), cast)
