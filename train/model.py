"""The forward pass that training uses: the llama family on the parameter tree of `sparsejax.models`, in float32.

It equals ``Decoder`` with ``DenseCausal`` (a test says so) and is faster to differentiate on CPU: rows of equal
length, attention by blocks of queries that read only the past, and logits only where a loss is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from train.attention import causal_attention

Params = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama-shaped decoder; hashable, so it can be a static argument."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 320
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    dot_dtype: str = "bfloat16"


def initialize(shape: Shape, seed: int) -> Params:
    """Random parameters: unit embeddings, a small untied head, output projections at half scale."""
    s = shape
    groups = s.num_heads // s.num_kv_heads
    keys = iter(jax.random.split(jax.random.key(seed), 4 * s.num_layers + 2))

    def normal(*dims: int, std: float) -> Array:
        return std * jax.random.normal(next(keys), dims, jnp.float32)

    params: Params = {"embed": normal(s.vocab_size, s.hidden_size, std=1.0)}
    inner = s.num_heads * s.head_dim
    for layer in range(s.num_layers):
        params[f"layers_{layer}"] = {
            "attn_norm": jnp.ones(s.hidden_size),
            "qkv": normal(s.num_kv_heads, groups + 2, s.head_dim, s.hidden_size, std=s.hidden_size**-0.5),
            "o": normal(s.hidden_size, s.num_kv_heads, groups, s.head_dim, std=0.5 * inner**-0.5),
            "mlp_norm": jnp.ones(s.hidden_size),
            "gate_up": normal(2, s.intermediate_size, s.hidden_size, std=s.hidden_size**-0.5),
            "down": normal(s.hidden_size, s.intermediate_size, std=0.5 * s.intermediate_size**-0.5),
        }
    params["final_norm"] = jnp.ones(s.hidden_size)
    params["lm_head"] = normal(s.vocab_size, s.hidden_size, std=0.02)
    return params


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _dot(x: Array, y: Array, contract: tuple[int, int], dtype: str) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x.astype(dtype), y.astype(dtype), dims, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: Array, weight: Array, dtype: str) -> Array:
    """``x @ weight.T`` with inputs rounded to `dtype`; on CPU the weight gradient is faster in float32."""
    return _dot(x, weight, (1, 1), dtype)


def _project_forward(x: Array, weight: Array, dtype: str) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x, weight, (1, 1), dtype), (x, weight)


def _project_backward(dtype: str, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    exact = "float32" if jax.default_backend() == "cpu" else dtype
    return _dot(gradient, weight, (1, 0), dtype), _dot(gradient, x, (0, 0), exact)


_project.defvjp(_project_forward, _project_backward)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE by halves; reversing the halves fuses into one pass, splitting and joining them does not."""
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    turned = halves * cos + lax.rev(halves, (halves.ndim - 2,)) * sin
    return turned.reshape(x.shape)


def forward(
    shape: Shape, params: Params, tokens: Int[Array, "R n"], positions: Int[Array, "R n"]
) -> Float[Array, "R n E"]:
    """Hidden states after the final norm."""
    s = shape
    rows, length = tokens.shape
    groups = s.num_heads // s.num_kv_heads
    frequencies = s.rope_theta ** (-jnp.arange(0, s.head_dim, 2, dtype=jnp.float32) / s.head_dim)
    angles = positions.astype(jnp.float32)[:, None, None, :, None] * frequencies
    cos = jnp.stack([jnp.cos(angles)] * 2, axis=-2)
    sin = jnp.stack([-jnp.sin(angles), jnp.sin(angles)], axis=-2)

    def project(x: Array, weight: Array) -> Array:
        return _project(x, weight, s.dot_dtype)

    x = params["embed"][tokens.reshape(-1)]
    for layer in range(s.num_layers):
        p = params[f"layers_{layer}"]
        flat = project(_norm(x, p["attn_norm"], s.norm_eps), p["qkv"].reshape(-1, s.hidden_size))
        qkv = flat.reshape(rows, length, s.num_kv_heads, groups + 2, s.head_dim).transpose(0, 2, 3, 1, 4)
        turned = _rotate(qkv[:, :, : groups + 1], cos, sin)
        out = causal_attention(turned[:, :, :groups], turned[:, :, groups], qkv[:, :, groups + 1])
        out = out.transpose(0, 3, 1, 2, 4).reshape(rows * length, -1)
        x = x + project(out, p["o"].reshape(s.hidden_size, -1))
        gate_up = project(_norm(x, p["mlp_norm"], s.norm_eps), p["gate_up"].reshape(-1, s.hidden_size))
        gate, up = jnp.split(gate_up, 2, axis=-1)
        x = x + project(jax.nn.silu(gate) * up, p["down"])
    return _norm(x, params["final_norm"], s.norm_eps).reshape(rows, length, s.hidden_size)


def logits(shape: Shape, params: Params, hidden: Float[Array, "M E"]) -> Float[Array, "M V"]:
    """Logits of every token for each hidden state."""
    return _project(hidden, params["lm_head"], shape.dot_dtype)
