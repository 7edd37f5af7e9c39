"""Codes of pages in VMEM as operands of products: what the attention kernel does for int8, fp8 and int4.

Int4 holds tokens r and P / 2 + r of a page in one byte. A block of n pages is unpacked into 2 n half pages, the
low halves first, which needs no shuffles: `place_of` tells where the tokens went. Keys are scaled as they are
widened, which costs little beside the widening itself; the scales of V multiply the probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def halves(codec: str | None) -> int:
    """Tokens of a byte."""
    return 2 if codec == "int4" else 1


def place_of(token: jax.Array, page: int, pages: int, codec: str | None) -> tuple[jax.Array, jax.Array]:
    """(page in the block, offset in that page) of the tokens of a block, in the order of the operands."""
    rows = page // halves(codec)
    half, within = lax.div(token, rows * pages), lax.rem(token, rows * pages)
    return lax.div(within, rows), half * rows + lax.rem(within, rows)


def widen(codes: jax.Array, codec: str | None) -> jax.Array:
    """Codes [n, Pc, M] as float32 [n or 2 n, Pc, M]."""
    if codec != "int4":
        return codes.astype(jnp.float32)
    both = codes.astype(jnp.int32)
    return jnp.concatenate([both & 15, both >> 4]).astype(jnp.float32)


def keys(codes: jax.Array, sides: Sequence[Any], head: Any, codec: str) -> jax.Array:
    """Keys [n or 2 n, Pc, M] float32 of codes [n, Pc, M], by the `sides` of `unfold_block` for a KV head."""
    widened = widen(codes, codec)
    side, *zero = (jnp.concatenate([ref[:, head]] * (widened.shape[0] // codes.shape[0])) for ref in sides)
    return widened * side + zero[0] if zero else widened * side


def unfold(scales: jax.Array, head_dim: int, page: int, codec: str) -> tuple[list[jax.Array], list[jax.Array]]:
    """The scales of a page [K, X], float32, as [scale, zero or nothing] of keys [K, X] and of values [K, X].

    Lanes past the head dim are 0 in the former; those past the page size hold anything in the latter.
    """
    lane = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    parts = halves(codec)
    keys = [jnp.where(lane < head_dim, _from(scales, i * head_dim), 0) for i in range(parts)]
    values = [_from(scales, parts * head_dim + i * page) for i in range(parts)]
    return keys, values


def unfold_block(scales: Any, key_sides: Sequence[Any], head_dim: int, page: int, codec: str) -> list[list[jax.Array]]:
    """Puts the scales (and zeros) of keys of a block's pages [n, K, X] into references [n, K, M]; gives those of values
    as `row_of_tokens` takes them."""
    values = []
    for j in range(scales.shape[0]):
        of_keys, of_values = unfold(scales[j].astype(jnp.float32), head_dim, page, codec)
        for ref, key in zip(key_sides, of_keys, strict=True):
            ref[j] = key[:, : ref.shape[2]]
        values.append(of_values)
    return [list(pages) for pages in zip(*values, strict=True)]


def row_of_tokens(values: list[jax.Array], page: int, codec: str) -> jax.Array:
    """Numbers of the tokens of each page, [K, X] per page in lanes 0 to P - 1, as one row [K, tokens] of the
    block in the order of the operands."""
    parts, kv_heads = halves(codec), values[0].shape[0]
    rows = page // parts
    lane = lax.broadcasted_iota(jnp.int32, (kv_heads, LANES), 1)
    columns = [jnp.zeros((kv_heads, LANES), jnp.float32) for _ in range(max(1, len(values) * page // LANES))]
    for half in range(parts):
        for j, value in enumerate(values):
            column, at = divmod((half * len(values) + j) * rows, LANES)
            moved = _from(value, half * rows - at)[:, :LANES]
            columns[column] = jnp.where((lane >= at) & (lane < at + rows), moved, columns[column])
    return jnp.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]


def _from(x: jax.Array, lane: int) -> jax.Array:
    """x rotated so that its lane `lane` becomes lane 0."""
    shift = -lane % x.shape[1]
    return pltpu.roll(x, shift, 1) if shift else x
