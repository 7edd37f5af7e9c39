"""Which directions of keys and values the model's answers depend on: the metric in which a compressor is to be good.

To second order the divergence of next-token distributions under a small error e of one token is e F e / 2, with F the
Fisher information: the second moment of the gradients of sampled tokens' log-probabilities. Errors where F is small
cost nothing, however large; principal components in this metric keep what matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.deltakv import vectors
from sparsejax.models.decoder import Decoder
from sparsejax.models.dense import DenseCausal
from sparsejax.models.loader import LoadedModel

FLOOR = 0.02
"""Of the mean eigenvalue, added to all: directions that no gradient was seen in may matter elsewhere."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moved:
    """Dense attention with `offsets` [T, K, 2, D] added to each layer's keys before rotation and values."""

    dense: DenseCausal
    offsets: tuple[Array, ...]

    def attend(
        self, layer: int, q: Array, k: Array, v: Array, batch: Any, rotate: Callable[[Array], Array]
    ) -> tuple[Array, Moved]:
        moved = self.offsets[layer]
        return self.dense.attend(layer, q, k + moved[:, :, 0], v + moved[:, :, 1], batch, rotate)[0], self


def sensitivities(
    model: LoadedModel, tokens: Int[np.ndarray, "R n"], layers: Collection[int], groups: int, seed: int = 0
) -> dict[str, Float[Array, "A W W"]]:
    """The Fisher information of one token's x in each of `layers`, by name, averaged over sequences of tokens."""
    cfg, (_, length) = model.config, tokens.shape
    decoder, dense = Decoder(cfg, model.dtype), DenseCausal.of(cfg)
    shape = (length, cfg.num_kv_heads, 2, cfg.head_dim)
    nothing = (jnp.zeros(shape, model.dtype),) * cfg.num_layers

    def surprise(offsets: tuple[Array, ...], params: Any, row: Array, key: Array) -> Array:
        batch = SimpleNamespace(tokens=row, positions=jnp.arange(length, dtype=jnp.int32))
        hidden, _ = decoder.apply({"params": params}, batch, Moved(dense, offsets))
        logits = decoder.apply({"params": params}, hidden, method="logits")
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=1).sum()

    @jax.jit
    def moments(params: Any, row: Array, key: Array) -> dict[str, Array]:
        slopes = jax.grad(surprise)(nothing, params, row, key)
        found = {}
        for layer in layers:
            x = vectors(slopes[layer][:, :, 0], slopes[layer][:, :, 1], groups).astype(jnp.float32)
            found[str(layer)] = jnp.einsum("taw,tax->awx", x, x) / length
        return found

    keys = jax.random.split(jax.random.key(seed), len(tokens))
    parts = [moments(model.params, jnp.asarray(row), key) for row, key in zip(tokens, keys, strict=True)]
    return jax.tree.map(lambda *found: sum(found) / len(found), *parts)


def root(metric: Float[Array, "A W W"]) -> Float[Array, "A W W"]:
    """The symmetric S with S S = `metric` plus a floor, of mean eigenvalue 1."""
    values, directions = jnp.linalg.eigh(metric)
    values = jnp.maximum(values, 0)
    values = values / values.mean(-1, keepdims=True) + FLOOR
    return jnp.einsum("awe,ae,axe->awx", directions, jnp.sqrt(values), directions)
