"""Weights of layers that the device has no room for: held in main memory, copied to the device ahead of use."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from sparsejax.errors import CapacityError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.loaded import LoadedModel
from sparsejax.models.params import layer_shapes, top_shapes

STREAMED = "streamed"
"""Of the parameter tree: weights of the streamed layers by name, each ``[streamed layers, ...]`` in main memory."""
BUFFERS = 2
"""Layers on the device at once besides those that stay: one computes while the next one arrives."""


def streamed_layers(params: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Layers whose weights are not on the device."""
    return tuple(layer for layer in range(num_layers) if f"layers_{layer}" not in params)


def choose_layers(config: DecoderConfig, dtype: np.dtype, budget: int) -> tuple[int, ...]:
    """The layers to stream so that all other weights and the buffers fit into `budget` bytes.

    As few as possible, evenly spread, so that the layers between them compute while they arrive.

    Raises:
        CapacityError: not even the weights besides the layers and the buffers fit.
    """
    layers = config.num_layers
    layer, top = (
        sum(map(math.prod, shapes.values())) * dtype.itemsize for shapes in (layer_shapes(config), top_shapes(config))
    )
    if top + layers * layer <= budget:
        return ()
    least = top + BUFFERS * layer
    if budget < least:
        raise CapacityError(
            f"weight_memory_bytes={budget} does not hold the embeddings ({top} bytes) beside {BUFFERS} layers of "
            f"{layer} bytes, through which the others are streamed: give at least {least}."
        )
    count = layers - (budget - least) // layer
    return tuple((2 * index + 1) * layers // (2 * count) for index in range(count))


def stream(model: LoadedModel, budget: int) -> LoadedModel:
    """`model`, wherever its weights are, with those on the device that `budget` bytes hold and the rest in main memory.

    Raises:
        CapacityError: see `choose_layers`.
    """
    chosen = [f"layers_{layer}" for layer in choose_layers(model.config, model.dtype, budget)]
    params = {name: jax.device_put(part) for name, part in model.params.items() if name not in chosen}
    if chosen:
        device = jax.local_devices()[0]
        kinds = {memory.kind for memory in device.addressable_memories()}
        host = SingleDeviceSharding(device, memory_kind="pinned_host" if "pinned_host" in kinds else None)
        params[STREAMED] = {
            name: jax.device_put(np.stack([np.asarray(model.params[layer][name]) for layer in chosen]), host)
            for name in layer_shapes(model.config)
        }
    return dataclasses.replace(model, params=params)


class Stream:
    """The streamed layers of one pass through a model, in order: at most `BUFFERS` of them are on the device."""

    def __init__(self, stacks: dict[str, Array], layers: tuple[int, ...]):
        self._stacks = stacks
        self._waiting = deque(enumerate(layers))
        self._here: dict[int, dict[str, Array]] = {}

    def ahead(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        """Starts the copies that there are buffers for, once `x`, the output of the layers so far, is computed.

        It is the index of the copy that depends on `x`: XLA keeps that order, while a barrier around the weights
        themselves does not hold a copy back.
        """
        while self._waiting and len(self._here) < BUFFERS:
            slot, layer = self._waiting.popleft()
            index, x = lax.optimization_barrier((jnp.int32(slot), x))
            copies = {name: lax.dynamic_index_in_dim(a, index, keepdims=False) for name, a in self._stacks.items()}
            self._here[layer] = jax.device_put(copies, jax.memory.Space.Device)
        return x

    def take(self, layer: int) -> dict[str, Array] | None:
        """The weights of a layer, which leave the device after it; None if they stay there anyway."""
        return self._here.pop(layer, None)
