"""Sealed pages as int8, fp8 (e4m3) or int4 codes: K scaled per channel of a page, V per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

import pallas_kernels
from pallas_kernels import codes, layouts
from pallas_kernels.dispatch import Implementation

type Codes = tuple[Shaped[Array, "N K Pc W"], Shaped[Array, "N K Pc W"] | None, Float[Array, "N K X"]]
type Partial = tuple[Float[Array, "T H D"], Float[Array, "T H"]]


@dataclass(frozen=True)
class QuantizedPages:
    """One layer's sealed pages in codes (KIVI, arXiv 2402.02750, with the page as the group).

    Pools of codes ``[N, K, P, W]`` (``[N, K, P / 2, W]`` for int4, two tokens to a byte) laid out as those of
    `DenseLayout`, and one pool of scales ``[N, K, X]`` in the model's dtype: see `pallas_kernels.codes`.

    Attributes:
        codec: ``"int8"``, ``"fp8"`` or ``"int4"``.
        dtype: of the scales, and of what is coded.
        lanes, num_pools: minor dimension and number of the pools of codes.
        scales_width: X, padding included.
        as_bytes: pools of fp8 are uint8 arrays, since XLA on CPU would convert whole pools of 8-bit floats.
    """

    codec: str
    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: np.dtype
    lanes: int
    num_pools: int
    scales_width: int
    as_bytes: bool = False

    @classmethod
    def beside(
        cls,
        codec: str,
        platform: str,
        *,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        dtype: np.dtype,
        lanes: int,
        num_pools: int,
    ) -> QuantizedPages:
        """Pools for a platform, whose pages have these dimensions in dense pools."""
        width = codes.scales_width(codec, page_size, head_dim)
        width += -width % layouts.LANES if platform == "tpu" else 0
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        return cls(codec, *shape, dtype, lanes, num_pools, width, codec == "fp8" and platform == "cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of each pool of codes."""
        rows = self.page_size // 2 if self.codec == "int4" else self.page_size
        return (self.num_pages, self.num_kv_heads, rows, self.lanes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, K and V with their scales."""
        _, heads, rows, lanes = self.shape
        stored = self.num_pools * rows * lanes * jnp.dtype(codes.DTYPES[self.codec]).itemsize
        return heads * (stored + self.scales_width * self.dtype.itemsize)

    def with_pages(self, num_pages: int) -> QuantizedPages:
        return replace(self, num_pages=num_pages)

    def zeros(self) -> Codes:
        """Empty pools. Zeros: scales of the dump page must be finite."""
        dtype = jnp.uint8 if self.as_bytes else codes.DTYPES[self.codec]
        second = jnp.zeros(self.shape, dtype) if self.num_pools == 2 else None
        scales = jnp.zeros((self.num_pages, self.num_kv_heads, self.scales_width), self.dtype)
        return jnp.zeros(self.shape, dtype), second, scales

    def view(self, pools: Codes) -> Codes:
        """The pools with codes in the dtype that names the codec."""
        if not self.as_bytes:
            return pools
        *stored, scales = pools
        dtype = codes.DTYPES[self.codec]
        return *(None if pool is None else codes.from_bytes(pool, dtype) for pool in stored), scales

    def seal(
        self,
        pools: Codes,
        raw: tuple[Float[Array, "R K P W"], Float[Array, "R K P W"] | None],
        sources: Int[Array, " S"],
        targets: Int[Array, " S"],
        count: Int[Array, ""],
        implementation: Implementation = None,
    ) -> Codes:
        """Codes the first `count` full pages ``sources`` of `raw` into pages ``targets``, in place."""
        coded = pallas_kernels.quantize_pages(
            *self.view(pools),
            *raw,
            sources,
            targets,
            head_dim=self.head_dim,
            count=count,
            implementation=implementation,
        )
        return jax.tree.map(lambda new, old: codes.from_bytes(new, old.dtype), coded, pools)

    def open(
        self,
        raw: tuple[Float[Array, "R K P W"], Float[Array, "R K P W"] | None],
        pools: Codes,
        pages: Int[Array, " S"],
        targets: Int[Array, " S"],
        count: Int[Array, ""],
        implementation: Implementation = None,
    ) -> tuple[Float[Array, "R K P W"], Float[Array, "R K P W"] | None]:
        """Decodes the first `count` of `pages` into pages ``targets`` of `raw`: `seal` the other way."""
        return pallas_kernels.open_pages(
            *raw,
            *self.view(pools),
            pages,
            targets,
            head_dim=self.head_dim,
            count=count,
            implementation=implementation,
        )

    def bounds(
        self,
        bounds: Float[Array, "N K X"],
        pools: Codes,
        pages: Int[Array, " S"],
        count: Int[Array, ""],
        implementation: Implementation = None,
    ) -> Float[Array, "N K X"]:
        """Takes in the key bounds of the first `count` of `pages`, as attention decodes them."""
        return pallas_kernels.page_bounds(
            bounds, self.view(pools)[0], pages, scales=pools[2], count=count, implementation=implementation
        )

    def prefill_attention(self, q: Float[Array, "T H D"], pools: Codes, *lists: Array, **options: Any) -> Partial:
        """A ragged chunk over the sealed pages before each query's own page."""
        return pallas_kernels.quantized_prefill_attention(q, *self.view(pools), *lists, return_lse=True, **options)

