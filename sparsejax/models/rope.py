"""Rotary position embeddings (Su et al., arXiv 2104.09864) and their context extensions.

Every kind is a table of inverse frequencies, computed on the host in float64, and a magnitude on cos and sin.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from sparsejax.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions, ``[D/2]`` float32."""
    plain = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _llama3(rope, plain)
    elif rope.kind == "yarn":
        plain = _yarn(rope, plain, head_dim)
    return plain.astype(np.float32)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long waves are stretched by ``factor``, short ones kept, the band between is blended linearly."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """NTK-by-parts (Peng et al., arXiv 2309.00071): a ramp over dimensions from kept to stretched waves."""

    def dimension_of(rotations: float) -> float:
        waves = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretch = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return (1 - stretch) * plain + stretch * plain / rope.factor


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "*T"]
) -> tuple[Float[Array, "*T D2"], Float[Array, "*T D2"]]:
    """``(cos, sin)`` float32 of each position, magnitude included; ``D2`` is ``head_dim // 2``."""
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


def apply_rope(
    x: Float[Array, "T *heads D"], cos: Float[Array, "T D2"], sin: Float[Array, "T D2"]
) -> Float[Array, "T *heads D"]:
    """Rotates dimension ``i`` with ``i + D/2``; computed in float32, returned in ``x.dtype``."""
    lead = cos.shape[:1] + (1,) * (x.ndim - 2) + cos.shape[1:]
    cos, sin = cos.reshape(lead), sin.reshape(lead)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotation(rope: RopeConfig, head_dim: int, positions: Int[Array, " T"]) -> Callable[[Array], Array]:
    """The function that rotates ``x [T, ..., D]`` at ``positions``; its tables are computed once."""
    # The barrier keeps XLA from computing cosines and sines anew in every layer.
    cos, sin = lax.optimization_barrier(rope_tables(rope, head_dim, positions))
    return lambda x: apply_rope(x, cos, sin)
