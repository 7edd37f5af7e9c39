"""The parameter tree: names, shapes, sizes and a random start."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.models.config import DecoderConfig

Shape = tuple[int, ...]


def layer_shapes(cfg: DecoderConfig) -> dict[str, Shape]:
    """One layer's parameters.

    Row ``g < G`` of ``qkv[k]`` is query head ``k * G + g``;
    rows ``G`` and ``G + 1`` are K and V of head ``k``.
    """
    e, f, d, k, g = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim, cfg.num_kv_heads, cfg.group_size
    shapes: dict[str, Shape] = {"attn_norm": (e,), "qkv": (k, g + 2, d, e), "o": (e, k, g, d)}
    if cfg.qkv_bias:
        shapes["qkv_bias"] = (k, g + 2, d)
    if cfg.qk_norm:
        shapes["q_norm"] = (d,)
        shapes["k_norm"] = (d,)
    if cfg.o_bias:
        shapes["o_bias"] = (e,)
    shapes |= {"mlp_norm": (e,), "gate_up": (2, f, e), "down": (e, f)}
    if cfg.mlp_bias:
        shapes |= {"gate_up_bias": (2, f), "down_bias": (e,)}
    return shapes


def top_shapes(cfg: DecoderConfig) -> dict[str, Shape]:
    """The parameters outside the layers."""
    shapes: dict[str, Shape] = {"embed": (cfg.vocab_size, cfg.hidden_size), "final_norm": (cfg.hidden_size,)}
    if not cfg.tie_embeddings:
        shapes["lm_head"] = (cfg.vocab_size, cfg.hidden_size)
    return shapes


def param_shapes(cfg: DecoderConfig) -> dict[str, Any]:
    """The whole tree with shapes as leaves."""
    layers = {f"layers_{i}": layer_shapes(cfg) for i in range(cfg.num_layers)}
    return top_shapes(cfg) | layers


def param_count(cfg: DecoderConfig) -> int:
    """Number of scalars in the tree."""
    leaves = jax.tree.leaves(param_shapes(cfg), is_leaf=lambda x: isinstance(x, tuple))
    return sum(math.prod(shape) for shape in leaves)


def init_params(
    cfg: DecoderConfig, rng: jax.Array | int, dtype: Any = jnp.float32, *, std: float = 0.02
) -> dict[str, Any]:
    """Random parameters: normal with ``std`` (residual outputs divided by sqrt(2L)), norms one, biases zero.

    Drawn in float32 on the host, each leaf from its own stream: nothing is compiled, and every platform
    starts from the same numbers.

    Args:
        rng: a concrete JAX key, or a seed.
        dtype: dtype of every leaf.
    """
    seed = [rng] if isinstance(rng, int) else np.asarray(jax.random.key_data(rng)).ravel().tolist()
    residual = std / math.sqrt(2 * cfg.num_layers)

    def leaf(path: tuple[str, ...], shape: Shape) -> jax.Array:
        name = path[-1]
        if name.endswith("norm"):
            return jax.device_put(np.ones(shape, dtype))
        if name.endswith("bias"):
            return jax.device_put(np.zeros(shape, dtype))
        scale = residual if name in ("o", "down") else std
        draws = np.random.default_rng([*seed, zlib.crc32("/".join(path).encode())])
        return jax.device_put((scale * draws.standard_normal(shape, np.float32)).astype(dtype))

    def branch(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        return {
            name: branch(node, (*path, name)) if isinstance(node, dict) else leaf((*path, name), node)
            for name, node in tree.items()
        }

    return branch(param_shapes(cfg), ())
