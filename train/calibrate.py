"""What needs no gradients: g refitted on rounded latents, and latent widths under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.deltakv import Grid, Weights
from sparsejax.errors import ConfigError
from train.pairs import Pairs, latents, principal, squared_error


def refitted(weights: Weights, pairs: Pairs, grid: Grid, ridge: float = 1e-4) -> Weights:
    """The weights with the g that is best for latents as stored: least squares of x - b on rounded z."""
    z = latents(weights, pairs, grid).reshape(-1, *weights["skip"].shape[:2])
    wanted = (pairs.tokens - pairs.bases).reshape(len(z), *weights["g"].shape[:2])
    gram = jnp.einsum("tac,tad->acd", z, z)
    gram += ridge * jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / gram.shape[1] * jnp.eye(gram.shape[1])
    cross = jnp.einsum("tac,taw->acw", z, wanted)
    return weights | {"g": jnp.linalg.solve(gram, cross).swapaxes(1, 2)}


def rates(
    pairs: Mapping[str, Pairs],
    metric: Mapping[str, Float[Array, "A W W"]],
    grid: Grid,
    choices: Sequence[int],
    mean: int,
) -> tuple[int, ...]:
    """A latent width for each layer, of ascending `choices` and `mean` on average at most, for the least divergence.

    What a width costs is the error of principal components under it, as stored, in nats per token: to second order
    e F e / 2 in the layer's `metric` F (see `train.sensitivity`).
    """
    errors = {}
    for layer, one in pairs.items():
        groups = one.tokens.shape[2]
        size = jnp.trace(metric[layer], axis1=1, axis2=2).mean() / metric[layer].shape[1] / 2
        made = (principal(one, width // groups, 1, 0) for width in choices)
        errors[int(layer)] = [float(squared_error(weights, one, grid) * size) for weights in made]
    return tuple(widths(errors, choices, mean * len(errors)).values())


def widths(errors: dict[int, Sequence[float]], choices: Sequence[int], budget: int) -> dict[int, int]:
    """A latent width for each layer, of ascending `choices`, with the least sum of `errors` found greedily.

    ``errors[layer][i]`` is the layer's error at ``choices[i]``. Starting from the narrowest, the widening that saves
    most error per channel is taken while the widths sum to at most `budget`.

    Raises:
        ConfigError: even the narrowest widths exceed the budget.
    """
    at = dict.fromkeys(errors, 0)
    used = len(errors) * choices[0]
    if used > budget:
        raise ConfigError(f"{len(errors)} layers of {choices[0]} channels exceed the budget of {budget}: raise it")
    while True:
        steps = [
            ((errors[layer][i] - errors[layer][i + 1]) / (choices[i + 1] - choices[i]), layer)
            for layer, i in at.items()
            if i + 1 < len(choices) and used + choices[i + 1] - choices[i] <= budget
        ]
        if not steps or max(steps)[0] <= 0:
            return {layer: choices[i] for layer, i in at.items()}
        layer = max(steps, key=lambda step: (step[0], -step[1]))[1]
        used += choices[at[layer] + 1] - choices[at[layer]]
        at[layer] += 1
