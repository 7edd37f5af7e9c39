"""What a layer's compressor codes: tokens beside their bases, and the start by principal components."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.deltakv import Grid, Weights, base_of, code_sequence, compress, expand, stored_latents, vectors
from train.sensitivity import root
from train.spread import Spread


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One layer's tokens that are no centers and their bases, by page, the `root` S of the metric |S e|^2 in which
    their errors e count, and the grid that they are coded on."""

    tokens: Float[Array, "S O A W"]
    bases: Float[Array, "S O A W"]
    root: Float[Array, "A W W"]
    grid: Grid

    def stored_as(self, codec: str) -> Pairs:
        """The same, their latents in another codec: references depend on centers alone."""
        return dataclasses.replace(self, grid=dataclasses.replace(self.grid, latents=codec))

    def part(self, chosen: Any) -> Pairs:
        """Those of some pages."""
        return dataclasses.replace(self, tokens=self.tokens[chosen], bases=self.bases[chosen])

    def over(self, spread: Spread) -> Pairs:
        """The same with its pages cut among devices."""
        tokens, bases = spread.split((self.tokens, self.bases))
        return Pairs(tokens, bases, spread.everywhere(self.root), self.grid)


jax.tree_util.register_dataclass(Pairs, ["tokens", "bases", "root"], ["grid"])


def pairs_of(kept: np.ndarray, grid: Grid, groups: int, metric: Float[Array, "A W W"] | None = None) -> Pairs:
    """Pairs of a layer's collected [R, n, K, 2, D]; without a metric keys and values count by their own spread."""
    heads, head_dim = kept.shape[2], kept.shape[4]
    whole = kept.shape[1] // grid.page_size * grid.page_size
    width = 2 * heads * head_dim // groups
    nothing = {name: jnp.zeros(shape) for name, shape in shapes(width, 1, 1, groups).items()}

    def one(row: Array) -> tuple[Array, Array]:
        x = vectors(row[:, :, 0], row[:, :, 1], groups)
        code, own = code_sequence(nothing, grid, x, head_dim)
        bases = base_of(own.reshape(-1, *own.shape[2:])[code.ordinals], code.index)
        tokens = x.reshape(-1, grid.own, grid.stride, groups, width)[:, :, 1:].reshape(bases.shape)
        return tokens, bases

    found = jax.lax.map(one, jnp.asarray(kept[:, :whole], jnp.float32))
    tokens, bases = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in found)
    measure = by_spread(tokens - bases, head_dim) if metric is None else root(metric)
    return Pairs(tokens, bases, measure, grid)


def shapes(width: int, latent: int, inner: int, groups: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights; `width`, `latent` and `inner` are those of a head group."""
    return {
        "skip": (groups, latent, width),
        "gate_up": (groups, 2, inner, width),
        "down": (groups, latent, inner),
        "g": (groups, width, latent),
    }


def by_spread(differences: Float[Array, "S O A W"], head_dim: int) -> Float[Array, "A W W"]:
    """The root of a metric in which keys and values count alike: one over the root mean square of each."""
    groups, width = differences.shape[2:]
    parts = differences.reshape(-1, width // (2 * head_dim), 2, head_dim)
    scale = jnp.sqrt(jnp.square(parts).mean((0, 1, 3)) + 1e-6)
    diagonal = jnp.tile(jnp.repeat(1 / scale, head_dim), width // (2 * head_dim))
    return jnp.broadcast_to(jnp.diag(diagonal), (groups, width, width))


def principal(pairs: Pairs, latent: int, inner: int, seed: int) -> Weights:
    """A start without training: f is linear, the principal components of x - b in the metric of the pairs. Among
    linear codes read back by one matrix none has a smaller error there, but for rounding."""
    groups, width = pairs.tokens.shape[2:]
    scaled = jnp.einsum("awx,soax->soaw", pairs.root, pairs.tokens - pairs.bases).reshape(-1, groups, width)
    _, directions = jnp.linalg.eigh(jnp.einsum("taw,tax->awx", scaled, scaled) / len(scaled))
    main = directions[..., ::-1][..., :latent]
    made = {name: jnp.zeros(shape) for name, shape in shapes(width, latent, inner, groups).items()}
    draw = jax.random.normal(jax.random.key(seed), made["gate_up"].shape)
    return made | {
        "skip": jnp.einsum("awc,awx->acx", main, pairs.root),
        "gate_up": jnp.einsum("auhw,awx->auhx", draw, pairs.root) * width**-0.5,
        "g": jnp.linalg.solve(pairs.root, main),
    }


def latents(weights: Weights, pairs: Pairs) -> Float[Array, "S O A C"]:
    """z of pairs as stored."""
    return stored_latents(compress(weights, pairs.tokens) - compress(weights, pairs.bases), pairs.grid)


def squared_error(weights: Weights, pairs: Pairs) -> Array:
    """Squared error of tokens that are read back in the metric of the pairs, mean over tokens."""
    return _size(expand(weights, latents(weights, pairs)) + pairs.bases - pairs.tokens, pairs)


def pair_error(weights: Weights, pairs: Pairs) -> Array:
    """`squared_error` over the spread of the tokens."""
    return squared_error(weights, pairs) / _size(pairs.tokens - pairs.tokens.mean((0, 1)), pairs)


def _size(vectors: Float[Array, "S O A W"], pairs: Pairs) -> Array:
    """Squared length in the metric of the pairs, mean over tokens."""
    return jnp.square(jnp.einsum("awx,soax->soaw", pairs.root, vectors)).sum((-2, -1)).mean()


def mean_error(params: dict[str, Weights], pairs: dict[str, Pairs]) -> Array:
    """`pair_error`, mean over layers."""
    return jnp.mean(jnp.stack([pair_error(params[name], pairs[name]) for name in params]))
