"""Physical shape of a layer's KV pages: the only place that knows it, its bytes, its writes and reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels import layouts
from pallas_kernels.dispatch import Implementation

type Pools = tuple[Float[Array, "N K P W"], Float[Array, "N K P W"] | None]


@dataclass(frozen=True)
class DenseLayout:
    """Keys and values of one layer in the model's dtype.

    Plain: two pools ``[N, K, P, D]``. A (page, head) tile is one contiguous ``[P, D]`` box: one bulk copy on
    a GPU, one cache-friendly block on a CPU, and a page is contiguous for moves between tiers.

    On a TPU the minor dimension is a multiple of 128 (`for_tpu`): narrow heads keep K and V side by side in
    one pool, and the second one is None; others are padded.

    Attributes:
        lanes: minor dimension of the pools, at least ``head_dim``.
        num_pools: 2, or 1 with K and V side by side.
    """

    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: np.dtype
    lanes: int
    num_pools: int = 2

    @classmethod
    def plain(
        cls, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: np.dtype
    ) -> DenseLayout:
        """Pools for CPU and GPU."""
        return cls(num_pages, num_kv_heads, page_size, head_dim, np.dtype(dtype), head_dim)

    @classmethod
    def for_tpu(
        cls, num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: np.dtype
    ) -> DenseLayout:
        """Pools that TPU kernels copy page by page without XLA laying them out anew."""
        num_pools, lanes = layouts.tpu_pools(head_dim)
        return cls(num_pages, num_kv_heads, page_size, head_dim, np.dtype(dtype), lanes, num_pools)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of each pool."""
        return (self.num_pages, self.num_kv_heads, self.page_size, self.lanes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer, K and V, as stored."""
        return self.num_pools * self.num_kv_heads * self.page_size * self.lanes * self.dtype.itemsize

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def with_pages(self, num_pages: int) -> DenseLayout:
        return replace(self, num_pages=num_pages)

    def zeros(self) -> Pools:
        """Empty pools. Zeros: lanes that no token fills must be finite."""
        second = jnp.zeros(self.shape, self.dtype) if self.num_pools == 2 else None
        return jnp.zeros(self.shape, self.dtype), second

    def write(
        self,
        pools: Pools,
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        page_ids: Int[Array, " T"],
        offsets: Int[Array, " T"],
        implementation: Implementation = None,
    ) -> Pools:
        """Stores the keys and values of T tokens, in place where the pools are donated."""
        return pallas_kernels.kv_write(*pools, k, v, page_ids, offsets, implementation=implementation)

    def copy(self, pools: Pools, source: Int[Array, " C"], target: Int[Array, " C"]) -> Pools:
        """Copies whole pages ``source[i] -> target[i]``; pairs of page 0 do nothing that is ever read."""
        return jax.tree.map(lambda pool: pool.at[target].set(pool[source]), pools)

    def move_tokens(
        self, pools: Pools, page_ids: Int[Array, " S"], slots: Int[Array, "K C"], new_pages: Int[Array, " S2"]
    ) -> Pools:
        """`move_tokens` of keys and values."""
        return jax.tree.map(lambda pool: move_tokens(pool, page_ids, slots, new_pages), pools)


def move_tokens(
    pool: Float[Array, "N K P X"], page_ids: Int[Array, " S"], slots: Int[Array, "K C"], new_pages: Int[Array, " S2"]
) -> Float[Array, "N K P X"]:
    """Copies the tokens at `slots` of the pages `page_ids`, per KV head, to the slots of `new_pages` in order.

    Slots past the pages leave zeros. `new_pages` hold at least C tokens.
    """
    _, kv_heads, page_size, lanes = pool.shape
    head, end = jnp.arange(kv_heads), page_ids.shape[0] * page_size
    pages, offsets = jnp.divmod(jnp.minimum(slots, end - 1), page_size)
    tokens = jnp.where((slots < end)[..., None], pool[page_ids[pages], head[:, None], offsets], 0)
    tokens = jnp.pad(tokens, ((0, 0), (0, len(new_pages) * page_size - slots.shape[1]), (0, 0)))
    tiles = tokens.reshape(kv_heads, len(new_pages), page_size, lanes).swapaxes(0, 1)
    return pool.at[new_pages[:, None], head].set(tiles)
