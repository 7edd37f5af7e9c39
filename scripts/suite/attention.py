"""How fast attention streams pages: our kernels, XLA gather, and cuDNN on contiguous keys and values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from pallas_kernels import codes
from suite import clock, coded, paged
from suite.records import Run, Unavailable


@dataclasses.dataclass(frozen=True)
class Shape:
    """`rows` of `held` tokens, of which each step reads lists of `read` tokens (all where None)."""

    rows: int
    held: int
    read: int | None = None
    chunk: int = 0
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 32
    skewed: bool = False
    codec: str | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row; skewed: one row holds what is given, the others a sixteenth."""
        lengths = np.full(self.rows, self.held, np.int32)
        if self.skewed:
            lengths[1:] //= 16
        return lengths

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values one call must read."""
        return self.rows * self.read if self.read else int(self.lengths.sum())

    @property
    def kv_values(self) -> int:
        return 2 * self.kv_tokens * self.kv_heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Bytes of keys and values that one call must read, scales included."""
        if self.codec is None:
            return 2 * self.kv_values
        scales = codes.scales_width(self.codec, self.page, self.head_dim) / self.page
        halves = 1 if self.codec == "int4" else 2
        return self.kv_values * halves // 2 + int(2 * scales * self.kv_tokens * self.kv_heads)

    @property
    def flops(self) -> int:
        """Multiply-adds times two of a prefill chunk, causal."""
        seen = self.rows * self.chunk * (self.held - (self.chunk - 1) / 2)
        return int(4 * seen * self.heads * self.head_dim)


DECODE = {
    "32 x 32K": Shape(32, 32768),
    "32 x 32K, page 16": Shape(32, 32768, page=16),
    "32 x 32K, page 128": Shape(32, 32768, page=128),
    "32 x 32K, head dim 64": Shape(32, 32768, head_dim=64),
    "8 x 128K dense": Shape(8, 131072),
    "8 x 128K, lists of 2048": Shape(8, 131072, read=2048),
    "1 x 128K": Shape(1, 131072),
    "64 x 2K": Shape(64, 2048),
    "32 x 32K, int8": Shape(32, 32768, codec="int8"),
    "32 x 32K, fp8": Shape(32, 32768, codec="fp8"),
    "32 x 32K, int4": Shape(32, 32768, codec="int4"),
    "32 rows, one of 128K, others of 8K": Shape(32, 131072, skewed=True),
}
PREFILL = {
    "1 x 2K chunk on 32K": Shape(1, 32768, chunk=2048),
    "4 x 2K from zero": Shape(4, 2048, chunk=2048),
    "1 x 2K chunk on 32K, int8": Shape(1, 32768, chunk=2048, codec="int8"),
    "1 x 2K chunk on 32K, int4": Shape(1, 32768, chunk=2048, codec="int4"),
}


def shapes(tiny: bool) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes of decode and prefill."""
    if not tiny:
        return DECODE, PREFILL
    small = dict(heads=4, kv_heads=2, head_dim=64)
    decode = {"tiny": Shape(2, 128, **small), "tiny, int4": Shape(2, 128, codec="int4", **small)}
    prefill = {"tiny": Shape(2, 64, chunk=32, **small), "tiny, int4": Shape(1, 64, chunk=32, codec="int4", **small)}
    return decode, prefill


def has_peers(shape: Shape) -> bool:
    """Whether the others are timed at this shape too."""
    return shape.page == 32 and not shape.skewed and shape.codec is None


def cases(tiny: bool) -> Iterator[tuple[str, Run]]:
    """The cases of this stage."""
    decode, prefill = shapes(tiny)
    size = (1 << 20) if tiny else (2 << 30)
    yield "copy bandwidth", functools.partial(clock.copy_bandwidth, size)
    for name, shape in decode.items():
        yield f"decode {name}: ours", functools.partial(ours, shape)
    for name, shape in prefill.items():
        yield f"prefill {name}: ours", functools.partial(ours, shape)
    for name, shape in decode.items():
        if has_peers(shape):
            yield f"decode {name}: XLA gather", functools.partial(gather, shape)
            yield f"decode {name}: cuDNN, contiguous", functools.partial(contiguous, shape, "cudnn")
    for name, shape in prefill.items():
        if shape.chunk == shape.held and has_peers(shape):
            yield f"prefill {name}: cuDNN, contiguous", functools.partial(contiguous, shape, "cudnn")


@functools.lru_cache(maxsize=1)
def pools(pages: int, kv_heads: int, page: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Random pools, kept for the next case of the same shape."""
    shape = (pages, kv_heads, page, head_dim)
    return paged.normal(1, shape, jnp.bfloat16), paged.normal(2, shape, jnp.bfloat16)


def lists(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, int]:
    """Page ids, counts, lengths and logical ids (None for dense), and how many pages the pool has."""
    rng = np.random.default_rng(0)
    held = -(-shape.lengths // shape.page)
    physical = rng.permutation(int(held.sum())) + 1
    width = (shape.read or shape.held) // shape.page
    ids = np.zeros((shape.rows, 1, width), np.int32)
    logical = np.zeros_like(ids)
    counts = np.minimum(held, width).astype(np.int32)
    for row, start in enumerate(np.cumsum(held) - held):
        chosen = np.sort(rng.permutation(held[row])[: counts[row]])
        chosen[-1] = held[row] - 1
        ids[row, 0, : counts[row]] = physical[start + chosen]
        logical[row, 0, : counts[row]] = chosen
    dense = None if shape.read is None else jnp.asarray(logical)
    return (
        jnp.asarray(ids),
        jnp.asarray(counts)[:, None],
        jnp.asarray(shape.lengths),
        dense,
        int(held.sum()) + 1,
    )


def queries(shape: Shape) -> jax.Array:
    return paged.normal(3, (shape.rows * max(shape.chunk, 1), shape.heads, shape.head_dim), jnp.bfloat16)


def call_of(shape: Shape) -> tuple[str, list[Any], dict[str, Any]]:
    """The op that serves a shape, its arguments, and those that are named."""
    ids, counts, lengths, logical, pages = lists(shape)
    extents = (pages, shape.kv_heads, shape.page, shape.head_dim)
    op = "paged_prefill_attention" if shape.chunk else "paged_decode_attention"
    if shape.codec is None:
        stored = pools(*extents)
    else:
        op, stored = op.replace("paged", "quantized"), coded.random_pools(shape.codec, *extents)
    arguments = [queries(shape), *stored, ids, counts, lengths]
    if shape.chunk:
        arguments.append(jnp.arange(shape.rows + 1, dtype=jnp.int32) * shape.chunk)
    return op, arguments, {} if logical is None else {"logical_ids": logical}


def ours(shape: Shape) -> dict[str, Any]:
    """The op as the engine calls it."""
    op, arguments, named = call_of(shape)
    chosen, _ = kernels.explain(op, *arguments, **named)

    def call(*given):
        plain = given[: len(arguments)]
        return getattr(kernels, op)(*plain, **dict(zip(named, given[len(arguments) :], strict=True)))

    return {"backend": chosen} | measured(shape, call, *arguments, *named.values())


def gather(shape: Shape) -> dict[str, Any]:
    """Gathers the listed pages to contiguous keys and values, then plain attention."""
    ids, counts, lengths, _, pages = lists(shape)
    k_pages, v_pages = pools(pages, shape.kv_heads, shape.page, shape.head_dim)

    def call(q, k_pages, v_pages, ids):
        def tokens(pool):
            return pool[ids[:, 0]].swapaxes(2, 3).reshape(shape.rows, -1, shape.kv_heads, shape.head_dim)

        return jax.nn.dot_product_attention(q[:, None], tokens(k_pages), tokens(v_pages))[:, 0]

    return measured(shape, call, queries(shape), k_pages, v_pages, ids)


def contiguous(shape: Shape, implementation: str) -> dict[str, Any]:
    """`jax.nn.dot_product_attention` on keys and values that already lie side by side."""
    pools.cache_clear()
    tokens = shape.read or shape.held
    size = (shape.rows, tokens, shape.kv_heads, shape.head_dim)
    k, v = paged.normal(1, size, jnp.bfloat16), paged.normal(2, size, jnp.bfloat16)
    q = queries(shape).reshape(shape.rows, -1, shape.heads, shape.head_dim)

    def call(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, is_causal=shape.chunk == shape.held)

    try:
        return measured(shape, call, q, k, v)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}"[:300]) from error


def measured(shape: Shape, call, *arguments) -> dict[str, Any]:
    """Time per call, and the bytes or operations that it stands for."""
    seconds = clock.seconds(call, *arguments)
    moved = shape.bytes
    result = {"seconds": seconds, "bytes": moved, "bytes_per_s": moved / seconds}
    if shape.chunk:
        result |= {"flops": shape.flops, "flops_per_s": shape.flops / seconds}
    return result
