"""What needs no gradients: g refitted on rounded latents, latent widths under a budget, filter layers by coverage."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.deltakv import Grid, Weights
from sparsejax.errors import ConfigError
from train.pairs import Pairs, latents


def refitted(weights: Weights, pairs: Pairs, grid: Grid, ridge: float = 1e-4) -> Weights:
    """The weights with the g that is best for latents as stored: least squares of x - b on rounded z."""
    z = latents(weights, pairs, grid).reshape(-1, *weights["skip"].shape[:2])
    wanted = (pairs.tokens - pairs.bases).reshape(len(z), *weights["g"].shape[:2])
    gram = jnp.einsum("tac,tad->acd", z, z)
    gram += ridge * jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / gram.shape[1] * jnp.eye(gram.shape[1])
    cross = jnp.einsum("tac,taw->acw", z, wanted)
    return weights | {"g": jnp.linalg.solve(gram, cross).swapaxes(1, 2)}


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


def top_tokens(
    q: Float[Array, "H D"], keys: Float[Array, "n K D"], count: int
) -> np.ndarray:
    """The `count` tokens with the largest probability in any head, rotated queries and keys."""
    grouped = q.reshape(keys.shape[1], -1, q.shape[1])
    scores = jnp.einsum("kgd,nkd->kgn", grouped, keys) * q.shape[1] ** -0.5
    return np.asarray(jax.lax.top_k(jax.nn.softmax(scores).max((0, 1)), count)[1])


def coverage(chosen: np.ndarray) -> Float[np.ndarray, "L L"]:
    """Share of layer j's tokens that layer i has chosen too, over probes; `chosen` [probes, L, count]."""
    layers = chosen.shape[1]
    shares = [
        [[np.isin(probe[j], probe[i]).mean() for j in range(layers)] for i in range(layers)] for probe in chosen
    ]
    return np.mean(shares, axis=0)


def filter_layers(share: np.ndarray, count: int, always: Collection[int] = (0,)) -> tuple[int, ...]:
    """`count` layers, those of `always` among them, chosen greedily for the largest coverage of the layers after each
    by the nearest filter layer before."""

    def total(filters: set[int]) -> float:
        return sum(share[max(f for f in filters if f <= j), j] for j in range(len(share)) if j not in filters)

    if 0 not in always or count < len(set(always)):
        raise ConfigError(f"layer 0 must always filter, and {count} must be at least the {len(set(always))} given")
    filters = set(always)
    while len(filters) < min(count, len(share)):
        # A filter layer reads all tokens itself: it counts as covered.
        filters.add(max(set(range(len(share))) - filters, key=lambda f: total(filters | {f}) + 1))
    return tuple(sorted(filters))
