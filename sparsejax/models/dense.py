"""Plain causal attention over the tokens of the call: training, oracles and tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig

_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCausal:
    """A KV object without state: each segment of the T tokens is one whole sequence, from its first token.

    Attributes:
        segment_length: tokens per sequence; T must be a multiple of it. None: all T tokens are one sequence.
        windows: per layer sliding window (``DecoderConfig.windows``); None is full attention everywhere.
        soft_cap: scores become ``cap * tanh(score / cap)``.
    """

    segment_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    windows: tuple[int | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, cfg: DecoderConfig, segment_length: int | None = None) -> DenseCausal:
        """The attention that ``cfg`` describes, sliding windows and soft cap included."""
        return cls(segment_length, cfg.windows, cfg.attn_soft_cap)

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        batch: Any,
        rotate: Callable[[Array], Array],
    ) -> tuple[Float[Array, "T H D"], DenseCausal]:
        """Softmax attention in float32 over the tokens at or before each query inside its segment."""
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        length = tokens if self.segment_length is None else self.segment_length
        if length < 1 or tokens % length:
            raise ConfigError(f"{tokens} tokens do not divide into segments of {length}")
        q = rotate(q).reshape(-1, length, kv_heads, heads // kv_heads, dim)
        k = rotate(k).reshape(-1, length, kv_heads, dim)
        v = v.reshape(-1, length, kv_heads, dim)
        exact = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        einsum = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
        scores = einsum("bqkgd,bskd->bkgqs", q, k) * dim**-0.5
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        age = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
        seen = age >= 0
        window = self.windows[layer] if self.windows else None
        if window is not None:
            seen &= age < window
        weights = jax.nn.softmax(jnp.where(seen, scores, _MASKED), axis=-1).astype(v.dtype)
        out = einsum("bkgqs,bskd->bqkgd", weights, v)
        return out.astype(q.dtype).reshape(tokens, heads, dim), self
