"""Listed pages of one layer as attention in XLA reads them, dense or coded, tile by tile."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import codes, layouts

# Tokens of a block. Measured on two cores without other load (H 12, K 4, D 64, bfloat16, ms per layer) for medium
# and small ones of 512 and 64, 256 and 64, 256 and 32, 128 and 32: 16 decode rows of 600 tokens 3.5, 4.0, 1.8, 2.1; a
# chunk of 496 tokens at 1000 11.3, 7.5, 8.1, 7.3. Large ones serve few queries: 14.4 against 17.8 ms for 4 rows of
# 16384 tokens on a busy machine.
LARGE, MEDIUM, SMALL = 1024, 256, 32
# Of lists of selected pages, which end in the open one and so in a block with a mask: 1.9 against 3.3 ms for 4 rows of
# 2048 of 16384 tokens.
LISTED_MEDIUM, LISTED_SMALL = 512, 128
FEW = 16  # queries of a KV head


def block_of(tokens: int, page_size: int) -> int:
    """Pages of a block of about so many tokens."""
    return max(1, tokens // page_size)


@dataclasses.dataclass(frozen=True)
class Pages:
    """One layer's pools, dense or coded with their scales, the page lists of all rows and the options of
    attention over them. `v_pages` may be None where it lies in `k_pages`, or where only keys are read."""

    k_pages: Array
    v_pages: Array | None
    page_ids: Array
    counts: Array
    logical_ids: Array | None
    scale: float
    window: int | None
    soft_cap: float | None
    scales: Array | None = None

    @classmethod
    def of(
        cls,
        k_pages: Array,
        v_pages: Array | None,
        page_ids: Array,
        counts: Array,
        logical_ids: Array | None,
        *,
        scales: Array | None = None,
        **options: Any,
    ) -> Pages:
        """Pads the lists to whole small blocks, so that a block never has to be shifted to fit."""
        size = k_pages.shape[2] if scales is None else codes.page_size(k_pages)
        small = SMALL if logical_ids is None else LISTED_SMALL
        padding = ((0, 0), (0, 0), (0, -page_ids.shape[2] % block_of(small, size)))
        if logical_ids is not None:
            logical_ids = jnp.pad(logical_ids, padding)
        page_ids = jnp.pad(page_ids, padding)
        return cls(k_pages, v_pages, page_ids, counts, logical_ids, scales=scales, **options)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k_pages.shape[2] if self.scales is None else codes.page_size(self.k_pages)

    @property
    def blocks(self) -> tuple[int, int]:
        """Tokens of medium and of small blocks."""
        return (MEDIUM, SMALL) if self.logical_ids is None else (LISTED_MEDIUM, LISTED_SMALL)

    def dtype(self, q: Array) -> Any:
        """What keys, values and the queries [K, M, D] are multiplied in.

        A float32 product of few queries beats one in bfloat16 on CPU: 7.5 against 8.7 ms per layer for 4 rows
        of 16384 tokens (H 12, K 4, D 64), and the bfloat16 product of a single query takes a path ten times
        slower still.
        """
        if q.shape[1] <= FEW:
            return jnp.float32
        return self.k_pages.dtype if self.scales is None else q.dtype

    def keys(self, ids: Array, q: Array) -> Array:
        """Keys [K, tokens, D] of listed pages [Kl, n], in the dtype of q [K, M, D]."""
        kv_heads, _, head_dim = q.shape
        tiles = self._tiles(self.k_pages, ids)
        if self.scales is None:
            tiles = tiles[..., :head_dim]
        else:
            tiles = codes.keys(tiles, self._tiles(self.scales, ids), head_dim)
        return tiles.reshape(kv_heads, -1, head_dim).astype(q.dtype)

    def mix(self, weights: Array, ids: Array, live: Array, dtype: Any, head_dim: int) -> Array:
        """Values of listed pages [Kl, n] under weights [K, M, tokens], where they are live: [K, M, D]."""
        pool, columns = layouts.columns(self.k_pages, self.v_pages, head_dim)[1]
        tiles, zero = self._tiles(pool, ids)[..., columns], None
        if self.scales is not None:
            codec = codes.codec_of(pool)
            scales = codes.Scales.of(self._tiles(self.scales, ids), codec, self.page_size, head_dim)
            tiles = codes.numbers(tiles, codec)
            # One factor per token: cheaper on the weights than on the values.
            scale, zero = (_flat(side, live) for side in (scales.v_scale, scales.v_zero))
        values = tiles.reshape(weights.shape[0], -1, head_dim).astype(dtype)
        values = jnp.where(live[..., None], values, 0)  # zero times NaN would be NaN
        if self.scales is None:
            return batched("kms,ksd->kmd", weights.astype(dtype), values)
        mixed = batched("kms,ksd->kmd", (weights * scale[:, None]).astype(dtype), values)
        return mixed if zero is None else mixed + ordered_sum(weights * zero[:, None])[..., None]

    def _tiles(self, pool: Array, ids: Array) -> Array:
        """Tiles [K, n, ..] of listed pages: each head's tokens lie together, so no transpose comes before the
        products. Columns are cut from the tiles: cut from the pool, they would copy it."""
        head = jnp.arange(pool.shape[1])[:, None]
        return codes.from_bytes(codes.as_bytes(pool).at[ids, head].get(mode="promise_in_bounds"), pool.dtype)


def _flat(side: Array | None, live: Array) -> Array | None:
    """Numbers [K, n, P] of tokens as [K, n * P] in float32, 0 where tokens are dead."""
    if side is None:
        return None
    return jnp.where(live, side.reshape(side.shape[0], -1), 0).astype(jnp.float32)


def batched(equation: str, a: Array, b: Array) -> Array:
    """An einsum that accumulates in float32 and rounds no float32 input, as GPUs would (tf32)."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def ordered_sum(weights: Array) -> Array:
    """The sum over the last axis in an order that does not depend on the others: XLA's own depends on how many rows
    there are."""
    while weights.shape[-1] % 2 == 0:
        half = weights.shape[-1] // 2
        weights = weights[..., :half] + weights[..., half:]
    return weights.sum(-1)
