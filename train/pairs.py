"""What a layer's compressor codes: tokens beside their bases, and the start by principal components."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.deltakv import Grid, Weights, base_of, code_sequence, compress, expand, stored_latents, vectors
from train.history import relative_error


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One layer's tokens that are no centers and their bases, by page: [S, O, A, W] each."""

    tokens: Float[Array, "S O A W"]
    bases: Float[Array, "S O A W"]


jax.tree_util.register_dataclass(Pairs, ["tokens", "bases"], [])


def pairs_of(kept: np.ndarray, grid: Grid, groups: int) -> Pairs:
    """Pairs of a layer's collected [R, n, K, 2, D]."""
    heads, head_dim = kept.shape[2], kept.shape[4]
    whole = kept.shape[1] // grid.page_size * grid.page_size
    width = 2 * heads * head_dim // groups
    nothing = {name: jnp.zeros(shape) for name, shape in shapes(width, 1, 1, groups).items()}

    def one(row: Array) -> Pairs:
        x = vectors(row[:, :, 0], row[:, :, 1], groups)
        code, own = code_sequence(nothing, grid, x, head_dim)
        bases = base_of(own.reshape(-1, *own.shape[2:])[code.ordinals], code.index)
        tokens = x.reshape(-1, grid.own, grid.stride, groups, width)[:, :, 1:].reshape(bases.shape)
        return Pairs(tokens, bases)

    found = jax.lax.map(one, jnp.asarray(kept[:, :whole], jnp.float32))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)


def shapes(width: int, latent: int, inner: int, groups: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights; `width`, `latent` and `inner` are those of a head group."""
    return {
        "skip": (groups, latent, width),
        "gate_up": (groups, 2, inner, width),
        "down": (groups, latent, inner),
        "g": (groups, width, latent),
    }


def spread(pairs: Pairs, head_dim: int) -> Float[Array, "A W"]:
    """One over the root mean square of what is to be coded, keys and values apart."""
    difference = pairs.tokens - pairs.bases
    parts = difference.reshape(-1, difference.shape[-1] // (2 * head_dim), 2, head_dim)
    scale = jnp.sqrt(jnp.square(parts).mean((0, 1, 3)) + 1e-6)
    repeated = jnp.tile(jnp.repeat(1 / scale, head_dim), difference.shape[-1] // (2 * head_dim))
    return jnp.broadcast_to(repeated, difference.shape[-2:])


def principal(pairs: Pairs, latent: int, inner: int, head_dim: int, seed: int) -> Weights:
    """A start without training: f is linear, the principal components of x - b with keys and values on one scale."""
    groups, width = pairs.tokens.shape[2:]
    scale = spread(pairs, head_dim)
    scaled = ((pairs.tokens - pairs.bases) * scale).reshape(-1, groups, width)
    _, vectors_ = jnp.linalg.eigh(jnp.einsum("taw,tax->awx", scaled, scaled) / len(scaled))
    main = vectors_[..., ::-1][..., :latent]
    made = {name: jnp.zeros(shape) for name, shape in shapes(width, latent, inner, groups).items()}
    draw = jax.random.normal(jax.random.key(seed), made["gate_up"].shape)
    return made | {
        "skip": main.swapaxes(1, 2) * scale[:, None],
        "gate_up": draw * scale[:, None, None] * width**-0.5,
        "g": main / scale[..., None],
    }


def latents(weights: Weights, pairs: Pairs, grid: Grid) -> Float[Array, "S O A C"]:
    """z of pairs as stored."""
    return stored_latents(compress(weights, pairs.tokens) - compress(weights, pairs.bases), grid)


def pair_error(weights: Weights, pairs: Pairs, grid: Grid, head_dim: int) -> Array:
    """Relative error of tokens that are read back."""
    return relative_error(expand(weights, latents(weights, pairs, grid)) + pairs.bases, pairs.tokens, head_dim)


def mean_error(params: dict[str, Weights], pairs: dict[str, Pairs], grid: Grid, head_dim: int) -> Array:
    """Relative error over layers."""
    return jnp.mean(jnp.stack([pair_error(params[name], pairs[name], grid, head_dim) for name in params]))
