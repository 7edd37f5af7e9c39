"""The optimizer: Muon for matrices, Adam for embeddings, norms and the head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from train.recipe import Recipe

# How each matrix is read: (inputs, outputs); axes not named are separate matrices (heads, gate and up).
MATRICES = {
    "qkv": MuonDimensionNumbers(reduction_axis=3, output_axis=2),
    "o": MuonDimensionNumbers(reduction_axis=3, output_axis=0),
    "gate_up": MuonDimensionNumbers(reduction_axis=2, output_axis=1),
    "down": MuonDimensionNumbers(reduction_axis=1, output_axis=0),
}


def _dimensions(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: MATRICES.get(path[-1].key), params)


def build_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Clipping, then Muon (Jordan 2024; update RMS 0.2 of the rate, Liu et al. 2025) or Adam, same schedule."""
    at, rates = (jnp.asarray(values, jnp.float32) for values in recipe.rate_knots())

    def rate(step: jax.Array) -> jax.Array:
        return jnp.interp(jnp.asarray(step, jnp.float32), at, rates)

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        muon(
            rate,
            beta=0.95,
            nesterov=True,
            consistent_rms=0.2,
            weight_decay=recipe.weight_decay,
            adam_b1=0.9,
            adam_b2=0.95,
            adam_weight_decay=0.0,
            adam_learning_rate=lambda step: recipe.adam_rate * rate(step),
            muon_weight_dimension_numbers=_dimensions,
        ),
    )
