"""One training step: gradients over micro-batches, one optimizer update, accuracy by task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from train import model
from train.data import Batch
from train.facts import KINDS

jax.tree_util.register_dataclass(Batch, ["tokens", "positions", "rows", "targets", "weights", "kinds"], [])


def scored_logits(shape: model.Shape, params: model.Params, batch: Batch) -> jax.Array:
    """Logits ``[R * S, V]`` at the scored places of a batch."""
    hidden = model.forward(shape, params, batch.tokens, batch.positions)
    picked = jnp.take_along_axis(hidden, batch.rows[..., None], axis=1)
    return model.logits(shape, params, picked.reshape(-1, shape.hidden_size))


def _loss(params: model.Params, shape: model.Shape, batch: Batch) -> tuple[jax.Array, jax.Array]:
    values = scored_logits(shape, params, batch)
    targets, weights = batch.targets.reshape(-1), batch.weights.reshape(-1)
    taken = jnp.take_along_axis(values, targets[:, None], axis=1)[:, 0]
    entropy = jax.nn.logsumexp(values, axis=-1) - taken
    right = (jnp.max(values, axis=-1) <= taken).astype(jnp.float32)
    kinds = batch.kinds.reshape(-1).astype(jnp.int32)
    of_kind = (kinds[None] == jnp.arange(len(KINDS))[:, None]).astype(jnp.float32)
    counts = jnp.stack([of_kind @ right, of_kind.sum(axis=1)])
    return jnp.sum(entropy * weights), counts


def build_step(shape: model.Shape, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """``(params, state, batch [A, R, ...]) -> (params, state, loss, counts [2, kinds])``, inputs donated."""

    def step(params: model.Params, state: Any, batch: Batch) -> tuple[Any, Any, jax.Array, jax.Array]:
        total = jnp.sum(batch.weights)

        def one(carry: tuple, micro: Batch) -> tuple[tuple, None]:
            gradients, loss, counts = carry
            (value, count), gradient = jax.value_and_grad(_loss, has_aux=True)(params, shape, micro)
            return (jax.tree.map(jnp.add, gradients, gradient), loss + value, counts + count), None

        start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros((2, len(KINDS))))
        if batch.tokens.shape[0] == 1:
            (gradients, loss, counts), _ = one(start, jax.tree.map(lambda x: x[0], batch))
        else:
            (gradients, loss, counts), _ = jax.lax.scan(one, start, batch)
        gradients = jax.tree.map(lambda x: x / total, gradients)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss / total, counts

    return jax.jit(step, donate_argnums=(0, 1))


def place(batch: Batch, micro_rows: int, mesh: Mesh) -> Batch:
    """Split rows into micro-batches ``[A, R, ...]`` and spread each micro-batch over the mesh."""
    sharding = NamedSharding(mesh, Spec(None, "data"))

    def one(array: np.ndarray) -> jax.Array:
        return jax.device_put(array.reshape(-1, micro_rows, *array.shape[1:]), sharding)

    return jax.tree.map(one, batch)
