"""KV objects for whole sequences at once: one that records what layers store, one that reads it as serving will."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import codes
from pallas_kernels.deltakv import Grid, Weights, halves, reconstructed, through, vectors
from pallas_kernels.pages import batched
from sparsejax.models.dense import DenseCausal

HIDDEN = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorder:
    """Dense attention that keeps every layer's keys before rotation and values, [T, K, 2, D]."""

    dense: DenseCausal
    kept: tuple[Array, ...] = ()

    def attend(
        self, layer: int, q: Array, k: Array, v: Array, batch: Any, rotate: Callable[[Array], Array]
    ) -> tuple[Array, Recorder]:
        out, _ = self.dense.attend(layer, q, k, v, batch, rotate)
        return out, Recorder(self.dense, (*self.kept, jnp.stack([k, v], axis=2)))


def relative_error(read: Float[Array, "... A W"], x: Float[Array, "... A W"], head_dim: int) -> Array:
    """Squared error of keys over their spread, plus that of values over theirs: alike for every layer and model."""
    parts = (*x.shape[:-2], -1, 2, head_dim)
    read, x = read.reshape(parts), x.reshape(parts)
    outer = tuple(range(x.ndim - 3))
    spread = jnp.square(x - x.mean(outer, keepdims=True)).mean((*outer, -3, -1))
    return (jnp.square(read - x).mean((*outer, -3, -1)) / (spread + 1e-6)).mean()


def coded(pages: Array, codec: str, axis: int) -> Array:
    """Values [.., P, D] as read back from codes, gradients straight through."""
    code, scale, zero = codes.encode(jax.lax.stop_gradient(pages), codec, axis, jnp.bfloat16)
    return through(pages, codes.decode(codes.pack(code) if codec == "int4" else code, codec, axis, scale, zero))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedHistory:
    """Sequences of `length` tokens, each query reading earlier pages as sealed and its own page raw.

    Attributes:
        layers: compressor weights per layer; None for filter layers, which are stored in `filter_codec`.
        grids: of each layer; that of a filter layer says how long a page is.
        raw_until: for each sequence, queries before this position read everything raw (``raw_prompt``: the prompt's
            length; ``sealed``: 0).
        losses: relative errors of the sparse layers so far.
    """

    layers: tuple[Weights | None, ...]
    raw_until: Int[Array, " B"]
    grids: tuple[Grid, ...] = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    filter_codec: str = dataclasses.field(default="int8", metadata={"static": True})
    losses: tuple[Array, ...] = ()

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        batch: Any,
        rotate: Callable[[Array], Array],
    ) -> tuple[Float[Array, "T H D"], CompressedHistory]:
        n, heads, grid = self.length, k.shape[1], self.grids[layer]
        raw, losses = (rotate(k), v), self.losses
        if self.layers[layer] is None:
            read = self._as_codes(*raw, grid.page_size)
        else:
            x = vectors(k, v, self.layers[layer]["g"].shape[0]).reshape(-1, n, *self._group_shape(layer))
            again = jax.vmap(lambda one: reconstructed(self.layers[layer], grid, one, k.shape[2]))(x)
            losses = (*losses, relative_error(again, x, k.shape[2]))
            keys, values = halves(again.reshape(-1, *again.shape[2:]), heads)
            read = rotate(keys), values
        place = jnp.arange(n)
        page = place // grid.page_size
        as_is = (page[:, None] == page) | (place < self.raw_until[:, None])[:, :, None]
        out = _attend(rotate(q), raw, read, as_is[:, None, None], n)
        return out, dataclasses.replace(self, losses=losses)

    def _group_shape(self, layer: int) -> tuple[int, int]:
        return self.layers[layer]["g"].shape[:2]

    def _as_codes(self, k: Array, v: Array, size: int) -> tuple[Array, Array]:
        """Keys per channel of a page, values per token; the open page raw."""
        whole = self.length // size * size
        if not whole:
            return k, v
        found = []
        for values, axis in ((k, -2), (v, -1)):
            rows = values.reshape(-1, self.length, *values.shape[1:])
            pages = rows[:, :whole].reshape(len(rows), -1, size, *values.shape[1:]).swapaxes(2, 3)
            read = coded(pages, self.filter_codec, axis).swapaxes(2, 3).reshape(len(rows), whole, *values.shape[1:])
            read = jnp.concatenate([read, rows[:, whole:]], axis=1)
            found.append(read.reshape(values.shape))
        return found[0], found[1]


def _attend(q: Array, raw: tuple[Array, Array], read: tuple[Array, Array], as_is: Array, n: int) -> Array:
    """Causal attention that reads `raw` keys and values where `as_is` [B, 1, 1, n, n], else `read`."""
    tokens, heads, dim = q.shape
    kv_heads = raw[0].shape[1]
    grouped = q.reshape(-1, n, kv_heads, heads // kv_heads, dim)
    (k, v), (k_read, v_read) = ([one.reshape(-1, n, kv_heads, dim) for one in pair] for pair in (raw, read))
    scores = jnp.where(as_is, batched("bqkgd,bskd->bkgqs", grouped, k), batched("bqkgd,bskd->bkgqs", grouped, k_read))
    seen = jnp.arange(n)[:, None] >= jnp.arange(n)
    share = jax.nn.softmax(jnp.where(seen, scores * dim**-0.5, HIDDEN), axis=-1)
    out = batched("bkgqs,bskd->bqkgd", jnp.where(as_is, share, 0), v)
    return (out + batched("bkgqs,bskd->bqkgd", jnp.where(as_is, 0, share), v_read)).reshape(q.shape).astype(q.dtype)
