"""Physical shape of a layer's KV pages: the only place that knows it, its byte counts, its writes and reads."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pallas_kernels


@dataclass(frozen=True)
class DenseLayout:
    """K and V pools of one layer in the model's dtype, each ``[N, K, P, D]``.

    A (page, head) tile is one contiguous ``[P, D]`` box: one bulk copy on a GPU, one cache-friendly block on a
    CPU, and a page is contiguous for moves between tiers.
    """

    num_pages: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.num_pages, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer, K and V."""
        return 2 * self.num_kv_heads * self.page_size * self.head_dim * np.dtype(self.dtype).itemsize

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    def with_pages(self, num_pages: int) -> DenseLayout:
        return DenseLayout(num_pages, self.num_kv_heads, self.page_size, self.head_dim, self.dtype)

    def zeros(self) -> tuple[Float[Array, "N K P D"], Float[Array, "N K P D"]]:
        return jnp.zeros(self.shape, self.dtype), jnp.zeros(self.shape, self.dtype)

    def write(
        self,
        pools: tuple[Array, Array],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        page_ids: Int[Array, "T"],
        offsets: Int[Array, "T"],
        implementation: str | None = None,
    ) -> tuple[Array, Array]:
        """Stores the keys and values of T tokens, in place where the pools are donated."""
        return pallas_kernels.kv_write(*pools, k, v, page_ids, offsets, implementation=implementation)

    def copy(self, pools: tuple[Array, Array], source: Int[Array, "C"], target: Int[Array, "C"]) -> tuple[Array, Array]:
        """Copies whole pages ``source[i] -> target[i]``; pairs of page 0 do nothing that is ever read."""
        return jax.tree.map(lambda pool: pool.at[target].set(pool[source]), pools)
