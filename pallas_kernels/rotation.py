"""Rotation of keys by their positions, and back."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotated(
    keys: Float[Array, "T K D"], positions: Int[Array, " T"], frequencies: Float[Array, " D2"], magnitude: float
) -> Float[Array, "T K D"]:
    """RoPE (arXiv 2104.09864) by halves: dimension d turns with d + D/2."""
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
    one, two = jnp.split(keys, 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def unrotated(
    keys: Float[Array, "T K D"], positions: Int[Array, " T"], frequencies: Float[Array, " D2"], magnitude: float
) -> Float[Array, "T K D"]:
    """The keys that `rotated` turned into these, in float32."""
    return rotated(keys, positions, -frequencies, 1 / magnitude)
