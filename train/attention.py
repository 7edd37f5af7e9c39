"""Causal attention of rows of equal length, for training.

Two forms of one function: plain blocks that autodiff handles, for accelerators, and a hand-written pair of passes for
CPU, where a loop over (row, KV head) keeps each tile in cache and is several times faster to differentiate.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Queries = Float[Array, "R K G n D"]
Keys = Float[Array, "R K n D"]
MASKED = -1e30


def causal_attention(q: Queries, k: Keys, v: Keys, *, on_cpu: bool | None = None) -> Queries:
    """Softmax attention of each position over itself and the past; `on_cpu` None asks the default backend."""
    on_cpu = jax.default_backend() == "cpu" if on_cpu is None else on_cpu
    if not on_cpu:
        return _blocks(q, k, v)
    rows, heads, groups, length, dim = q.shape
    flat = _looped(q.reshape(-1, groups, length, dim), k.reshape(-1, length, dim), v.reshape(-1, length, dim))
    return flat.reshape(q.shape)


def _blocks(q: Queries, k: Keys, v: Keys, block: int = 128) -> Queries:
    length, scale = q.shape[3], q.shape[-1] ** -0.5
    block = min(block, length)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def one(q: Array, k: Array, v: Array) -> Array:
        start = k.shape[2] - q.shape[3]
        scores = jnp.einsum("rkgqd,rksd->rkgqs", q, k, preferred_element_type=jnp.float32) * scale
        seen = jnp.arange(k.shape[2])[None, :] <= start + jnp.arange(q.shape[3])[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1)
        return jnp.einsum("rkgqs,rksd->rkgqd", weights, v, preferred_element_type=jnp.float32)

    parts = [
        one(q[:, :, :, start : start + block], k[:, :, : start + block], v[:, :, : start + block])
        for start in range(0, length, block)
    ]
    return jnp.concatenate(parts, axis=3)


def _half(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """A product with inputs rounded to bfloat16 and a float32 result."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), dims, preferred_element_type=jnp.float32)


def _spans(length: int) -> list[tuple[int, int]]:
    block = 64 if length <= 256 else 128
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _seen(start: int, stop: int) -> Array:
    return jnp.arange(stop)[None] <= jnp.arange(start, stop)[:, None]


@jax.custom_vjp
def _looped(q: Float[Array, "B G n D"], k: Float[Array, "B n D"], v: Float[Array, "B n D"]) -> Float[Array, "B G n D"]:
    return _looped_forward(q, k, v)[0]


def _looped_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    _, groups, length, dim = q.shape

    def one(args: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v = args
        outs, norms = [], []
        for start, stop in _spans(length):
            query = q[:, start:stop].reshape(-1, dim) * dim**-0.5
            scores = _half(query, k[:stop], (1, 1)).reshape(groups, stop - start, stop)
            scores = jnp.where(_seen(start, stop), scores, MASKED)
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            mixed = _half(weights.reshape(-1, stop), v[:stop], (1, 0)) / total.reshape(-1, 1)
            outs.append(mixed.reshape(groups, stop - start, dim))
            norms.append((top + jnp.log(total))[..., 0])
        return jnp.concatenate(outs, 1), jnp.concatenate(norms, 1)

    out, norm = lax.map(one, (q, k, v))
    return out, (q, k, v, out, norm)


def _looped_backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    _, groups, length, dim = saved[0].shape

    def one(args: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, out, norm, gradient = args
        parts, dk, dv = [], jnp.zeros_like(k), jnp.zeros_like(v)
        shared = (out * gradient).sum(-1)
        for start, stop in _spans(length):
            query = q[:, start:stop].reshape(-1, dim) * dim**-0.5
            incoming = gradient[:, start:stop].reshape(-1, dim)
            scores = _half(query, k[:stop], (1, 1)).reshape(groups, stop - start, stop)
            weights = jnp.where(_seen(start, stop), jnp.exp(scores - norm[:, start:stop, None]), 0.0).reshape(-1, stop)
            change = weights * (_half(incoming, v[:stop], (1, 1)) - shared[:, start:stop].reshape(-1, 1))
            parts.append((_half(change, k[:stop], (1, 0)) * dim**-0.5).reshape(groups, stop - start, dim))
            dk = dk.at[:stop].add(lax.dot_general(change, query, (((0,), (0,)), ((), ()))))
            dv = dv.at[:stop].add(lax.dot_general(weights, incoming, (((0,), (0,)), ((), ()))))
        return jnp.concatenate(parts, 1), dk, dv

    return lax.map(one, (*saved, gradient))


_looped.defvjp(_looped_forward, _looped_backward)
