"""Reduction over the query heads of a KV head, and the value that stands for what is not there."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

HIDDEN = -1e30


def reduce_group(values: Array, group: str, axis: int) -> Array:
    """The "max", "mean" or "sum" over the axis of the G query heads."""
    return {"max": jnp.max, "mean": jnp.mean, "sum": jnp.sum}[group](values, axis=axis)
