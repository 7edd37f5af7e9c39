"""What needs no gradients: g refitted on rounded latents, and each layer's latent width and codec under a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.deltakv import Grid, Weights
from sparsejax.cache.codecs.deltakv import DeltaPages
from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig
from train.pairs import Pairs, latents, principal, squared_error


class Rate(NamedTuple):
    """How a layer stores its latents: their width over all head groups, and ``int4``, ``int8`` or ``none``."""

    width: int
    codec: str


def refitted(weights: Weights, pairs: Pairs, ridge: float = 1e-4) -> Weights:
    """The weights with the g that is best for latents as stored: least squares of x - b on rounded z."""
    z = latents(weights, pairs).reshape(-1, *weights["skip"].shape[:2])
    wanted = (pairs.tokens - pairs.bases).reshape(len(z), *weights["g"].shape[:2])
    gram = jnp.einsum("tac,tad->acd", z, z)
    gram += ridge * jnp.trace(gram, axis1=1, axis2=2)[:, None, None] / gram.shape[1] * jnp.eye(gram.shape[1])
    cross = jnp.einsum("tac,taw->acw", z, wanted)
    return weights | {"g": jnp.linalg.solve(gram, cross).swapaxes(1, 2)}


def nats(weights: Weights, pairs: Pairs, metric: Float[Array, "A W W"]) -> float:
    """What the errors of one token in this layer do to answers: e F e / 2 on average, which is their divergence to
    second order, in the `metric` F of the pairs (see `train.sensitivity`)."""
    size = jnp.trace(metric, axis1=1, axis2=2).mean() / metric.shape[1] / 2
    return float(squared_error(weights, pairs) * size)


def page_bytes(cfg: DecoderConfig, grid: Grid, rate: Rate, groups: int = 1) -> int:
    """Bytes of one page of one layer: centers, references, latents and scales."""
    shape = (1, cfg.num_kv_heads, cfg.head_dim, rate.width // groups, groups, jnp.dtype(jnp.bfloat16))
    return DeltaPages(dataclasses.replace(grid, latents=rate.codec), cfg.rope, *shape).page_bytes


def rates(
    pairs: Mapping[str, Pairs],
    metric: Mapping[str, Float[Array, "A W W"]],
    cfg: DecoderConfig,
    choices: Sequence[Rate],
    budget: int,
) -> dict[int, Rate]:
    """One of the `choices` for each layer, for the least divergence; one page of them all has `budget` bytes at most.

    What a choice costs in answers is the error of principal components under it, as stored, in `nats`.

    Raises:
        ConfigError: even the cheapest choices exceed the budget.
    """
    errors: dict[int, list[float]] = {}
    for layer, one in pairs.items():
        groups = one.tokens.shape[2]
        starts = {width: principal(one, width // groups, 1, 0) for width in {rate.width for rate in choices}}
        errors[int(layer)] = [nats(starts[width], one.stored_as(codec), metric[layer]) for width, codec in choices]
    some = next(iter(pairs.values()))
    sizes = [page_bytes(cfg, some.grid, rate, some.tokens.shape[2]) for rate in choices]
    return {layer: choices[i] for layer, i in allocated(errors, sizes, budget).items()}


def allocated(errors: Mapping[int, Sequence[float]], sizes: Sequence[int], budget: int) -> dict[int, int]:
    """The choice of each layer with the least sum of `errors` among those whose `sizes` sum to at most `budget`.

    ``errors[layer][i]`` is the layer's error under choice i, which takes ``sizes[i]`` bytes. Exact: layer by layer,
    of all ways to choose so far those are kept than which none is at once as small and as good. (Steepest steps along
    each layer's convex hull come close, but stop short of a budget that one more step would exceed.)

    Raises:
        ConfigError: even the smallest choices exceed the budget.
    """
    least = min(sizes)
    if len(errors) * least > budget:
        raise ConfigError(
            f"{len(errors)} layers take {len(errors) * least} bytes of a page at least, which exceeds the budget of "
            f"{budget}: raise it, or offer narrower latents"
        )
    kept: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for done, row in enumerate(errors.values(), start=1):
        room = budget - (len(errors) - done) * least
        ways = sorted(
            (held + size, error + row[i], (*chosen, i))
            for held, error, chosen in kept
            for i, size in enumerate(sizes)
            if held + size <= room
        )
        kept = []
        for way in ways:
            if not kept or way[1] < kept[-1][1]:
                kept.append(way)
    return dict(zip(errors, kept[-1][2], strict=True))
