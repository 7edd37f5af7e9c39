"""What a decode benchmark of DeltaKV needs beside a random model: a random compressor, and pools that refer to it."""

from __future__ import annotations

from typing import Any

SHARE, INNER = 4, 3
"""A latent has a quarter of a vector's width, f three times as many inner channels, as in the published compressors."""


def layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Of the weights of one layer's compressor, in one head group."""
    width = 2 * config.num_kv_heads * config.head_dim
    latent, inner = width // SHARE, INNER * width
    return {
        "skip": (1, latent, width), "gate_up": (1, 2, inner, width), "down": (1, latent, inner), "g": (1, width, latent)
    }  # fmt: skip


def random_compressor(config: Any, page_size: int) -> Any:
    """Random weights for all layers but those that select; centers 16 apart, one neighbour. Speed alone is tested."""
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.deltakv import Grid
    from sparsejax.cache.codecs.compressor import Compressor
    from sparsejax.sparsity.policy import spread_filters

    rng, filters = np.random.default_rng(0), spread_filters(config.num_layers)[: config.num_layers - 1]

    def one() -> dict[str, Any]:
        return {
            name: jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, jnp.float32)
            for name, shape in layer_shapes(config).items()
        }

    return Compressor(Grid(page_size), {i: one() for i in range(config.num_layers) if i not in filters})


def plan_of(compressor: Any, num_layers: int) -> Any:
    """How a model's layers store pages under a compressor."""
    from sparsejax.cache.plan import Plan

    return Plan.of(*compressor.facts, num_layers)


def within(pools: Any, grid: Any, tokens: int) -> Any:
    """Random DeltaKV pools whose references name centers of a sequence of `tokens`."""
    references = pools.references % (tokens // grid.stride)
    return pools._replace(references=references, index=pools.index % grid.references)
