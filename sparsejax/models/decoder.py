"""One decoder for every family, as a pure function of parameters, a batch of flat tokens and a KV object.

The decoder owns everything but attention over the past: it hands each layer's unrotated q, k, v to
``kv.attend``, which decides what to store and what to read, and returns the updated KV object.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from sparsejax.models.config import DecoderConfig
from sparsejax.models.params import layer_shapes, top_shapes
from sparsejax.models.rope import rotation
from sparsejax.models.streaming import STREAMED, Stream


@runtime_checkable
class Batch(Protocol):
    """What the decoder reads of a batch."""

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]


@runtime_checkable
class KV(Protocol):
    """Attention over the past of each sequence, and the storage behind it."""

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        batch: Any,
        rotate: Callable[[Array], Array],
    ) -> tuple[Float[Array, "T H D"], KV]: ...


def linear(x: Float[Array, "... C"], weight: Float[Array, "... C2"], axes: int = 1) -> Float[Array, "... N"]:
    """``x`` times an output-first weight over their last ``axes`` dimensions, accumulated in float32.

    The result is float32 too. Float32 models ask for full float32 products, where GPUs and TPUs would
    otherwise round the inputs.

    The product is one of two matrices: XLA CPU takes six times as long for a gate-up product of 16 rows that
    keeps the weight's three dimensions (33 against 5 ms for 12 layers of [2, 2048, 768] in bfloat16).
    """
    kept = weight.shape[: weight.ndim - axes]
    rows = x.shape[: x.ndim - axes]
    size = math.prod(weight.shape[weight.ndim - axes :])
    out = lax.dot_general(
        x.reshape(math.prod(rows), size),
        weight.astype(x.dtype).reshape(math.prod(kept), size),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(*rows, *kept)


def rms_norm(x: Float[Array, "... E"], weight: Float[Array, " E"], eps: float) -> Float[Array, "... E"]:
    """Root-mean-square norm in float32 (Zhang and Sennrich, arXiv 1910.07467), returned in ``x.dtype``."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


def _activation(name: str) -> Callable[[Array], Array]:
    exact = functools.partial(jax.nn.gelu, approximate=False)
    return {"silu": jax.nn.silu, "gelu": exact, "gelu_tanh": jax.nn.gelu}[name]


def _declare(module: nn.Module, shapes: dict[str, tuple[int, ...]], dtype: Any) -> dict[str, Array]:
    return {name: module.param(name, nn.initializers.zeros, shape, dtype) for name, shape in shapes.items()}


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated MLP, both residual."""

    cfg: DecoderConfig
    dtype: Any
    index: int

    def setup(self) -> None:
        self.weights = _declare(self, layer_shapes(self.cfg), self.dtype)

    def __call__(
        self, x: Float[Array, "T E"], batch: Batch, kv: KV, rotate: Callable[[Array], Array]
    ) -> tuple[Float[Array, "T E"], KV]:
        attended, kv = self._attention(x, batch, kv, rotate)
        x = x + attended
        return x + self._mlp(x), kv

    def _attention(
        self, x: Float[Array, "T E"], batch: Batch, kv: KV, rotate: Callable[[Array], Array]
    ) -> tuple[Float[Array, "T E"], KV]:
        cfg, w = self.cfg, self.weights
        groups = cfg.group_size
        qkv = linear(rms_norm(x, w["attn_norm"], cfg.norm_eps), w["qkv"])
        if cfg.qkv_bias:
            qkv = qkv + w["qkv_bias"].astype(jnp.float32)
        qkv = qkv.astype(x.dtype)
        q = qkv[:, :, :groups].reshape(x.shape[0], cfg.num_heads, cfg.head_dim)
        k, v = qkv[:, :, groups], qkv[:, :, groups + 1]
        if cfg.qk_norm:
            q = rms_norm(q, w["q_norm"], cfg.norm_eps)
            k = rms_norm(k, w["k_norm"], cfg.norm_eps)
        o, kv = kv.attend(self.index, q, k, v, batch, rotate)
        o = o.astype(x.dtype).reshape(x.shape[0], cfg.num_kv_heads, groups, cfg.head_dim)
        out = linear(o, w["o"], axes=3)
        if cfg.o_bias:
            out = out + w["o_bias"].astype(jnp.float32)
        return out.astype(x.dtype), kv

    def _mlp(self, x: Float[Array, "T E"]) -> Float[Array, "T E"]:
        cfg, w = self.cfg, self.weights
        gate_up = linear(rms_norm(x, w["mlp_norm"], cfg.norm_eps), w["gate_up"])
        if cfg.mlp_bias:
            gate_up = gate_up + w["gate_up_bias"].astype(jnp.float32)
        inner = (_activation(cfg.activation)(gate_up[:, 0]) * gate_up[:, 1]).astype(x.dtype)
        out = linear(inner, w["down"])
        if cfg.mlp_bias:
            out = out + w["down_bias"].astype(jnp.float32)
        return out.astype(x.dtype)


class Decoder(nn.Module):
    """``apply({"params": p}, batch, kv)`` gives ``(hidden [T, E], kv)``, hidden after the final norm.

    ``apply({"params": p}, hidden, method="logits")`` gives float32 logits ``[..., V]``,
    so a caller reads out only the rows it samples.
    """

    cfg: DecoderConfig
    dtype: Any = jnp.float32
    streamed: tuple[int, ...] = ()

    def setup(self) -> None:
        self.weights = _declare(self, top_shapes(self.cfg), self.dtype)
        self.layers = [DecoderLayer(self.cfg, self.dtype, i) for i in range(self.cfg.num_layers)]

    def __call__(self, batch: Batch, kv: KV) -> tuple[Float[Array, "T E"], KV]:
        rotate = rotation(self.cfg.rope, self.cfg.head_dim, batch.positions)
        x = jnp.take(self.weights["embed"], batch.tokens, axis=0).astype(self.dtype)
        stream = Stream(self.get_variable("params", STREAMED), self.streamed)
        for index, layer in enumerate(self.layers):
            x, weights = stream.ahead(x), stream.take(index)
            if weights is None:
                x, kv = layer(x, batch, kv, rotate)
            else:
                here = DecoderLayer(self.cfg, self.dtype, index, parent=None)
                x, kv = here.apply({"params": weights}, x, batch, kv, rotate)
        return rms_norm(x, self.weights["final_norm"], self.cfg.norm_eps), kv

    def logits(self, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
        head = self.weights["embed" if self.cfg.tie_embeddings else "lm_head"]
        logits = linear(hidden.astype(self.dtype), head)
        cap = self.cfg.final_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
