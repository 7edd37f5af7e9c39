"""Physical shape of a layer's KV pages: the only place that knows it, its bytes, its writes and reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels import layouts
from pallas_kernels.deltakv_pools import DeltaPools
from pallas_kernels.dispatch import Implementation
from sparsejax.cache.codecs.deltakv import DeltaPages
from sparsejax.cache.codecs.quantized import Codes, QuantizedPages

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
    codec: ClassVar[str] = "dense"

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

    fixed_bytes = row_bytes = 0
    """Bytes besides the pages: of all rows, and of each; open pages are pages like others here."""
    latent = False

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

    def take(self, pools: Pools, others: Pools, source: Int[Array, " C"], target: Int[Array, " C"]) -> Pools:
        """Copies whole pages ``source[i]`` of other pools of this layout to ``target[i]`` of `pools`."""
        return jax.tree.map(lambda pool, other: pool.at[target].set(other[source]), pools, others)

    def pick(
        self, pools: Pools, page_ids: Int[Array, " S"], slots: Int[Array, "K C"], num_pages: int
    ) -> Pools:
        """`pick_tokens` of keys and values."""
        return jax.tree.map(lambda pool: pick_tokens(pool, page_ids, slots, num_pages), pools)

    def put(self, pools: Pools, pages: Pools, targets: Int[Array, " C"]) -> Pools:
        """Stores C whole pages at `targets`; page 0 absorbs those that are not wanted."""
        return jax.tree.map(lambda pool, new: put_pages(pool, new, targets), pools, pages)


@dataclass(frozen=True)
class CodedLayout:
    """Sealed pages of one layer in codes, and the one open page of each row in the model's dtype.

    Attributes:
        sealed: pools of the sealed pages, indexed by page id.
        open: pools of the open pages. Row r's is page r + 1; page 0 absorbs padding.
    """

    sealed: QuantizedPages | DeltaPages
    open: DenseLayout

    @classmethod
    def of(cls, dense: DenseLayout, codec: str, num_rows: int, platform: str) -> CodedLayout:
        """As many pages as `dense` has, in codes, with open pages for `num_rows` rows."""
        names = ("num_pages", "num_kv_heads", "page_size", "head_dim", "dtype", "lanes", "num_pools")
        sealed = QuantizedPages.beside(codec, platform, **{name: getattr(dense, name) for name in names})
        return cls(sealed, dense.with_pages(num_rows + 1))

    def with_pages(self, num_pages: int) -> CodedLayout:
        return replace(self, sealed=self.sealed.with_pages(num_pages))

    @property
    def latent(self) -> bool:
        """Whether sealed pages are DeltaKV latents, of which nothing can be read without the rest of the row."""
        return isinstance(self.sealed, DeltaPages)

    @property
    def codec(self) -> str:
        """The name of what stores sealed pages."""
        return "deltakv" if self.latent else self.sealed.codec

    @property
    def num_pages(self) -> int:
        return self.sealed.num_pages

    @property
    def num_kv_heads(self) -> int:
        return self.sealed.num_kv_heads

    @property
    def page_size(self) -> int:
        return self.sealed.page_size

    @property
    def head_dim(self) -> int:
        return self.sealed.head_dim

    @property
    def dtype(self) -> np.dtype:
        """Of open pages and of scales."""
        return self.sealed.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one sealed page of one layer, scales included."""
        return self.sealed.page_bytes

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the open pages of all rows."""
        return self.open.pool_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's open page."""
        return self.open.page_bytes

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes + self.fixed_bytes

    def zeros(self) -> tuple[Codes | DeltaPools, Pools]:
        """Empty pools of sealed pages and of open ones."""
        return self.sealed.zeros(), self.open.zeros()


def pick_tokens(
    pool: Float[Array, "N K P X"], page_ids: Int[Array, " S"], slots: Int[Array, "K C"], num_pages: int
) -> Float[Array, "N2 K P X"]:
    """The tokens at `slots` of the pages `page_ids`, per KV head, in order in pages of their own.

    Slots past the pages give zeros. `num_pages` hold at least C tokens.
    """
    _, kv_heads, page_size, lanes = pool.shape
    head, end = jnp.arange(kv_heads), page_ids.shape[0] * page_size
    pages, offsets = jnp.divmod(jnp.minimum(slots, end - 1), page_size)
    tokens = jnp.where((slots < end)[..., None], pool[page_ids[pages], head[:, None], offsets], 0)
    tokens = jnp.pad(tokens, ((0, 0), (0, num_pages * page_size - slots.shape[1]), (0, 0)))
    return tokens.reshape(kv_heads, num_pages, page_size, lanes).swapaxes(0, 1)


def put_pages(
    pool: Float[Array, "N K *X"], pages: Float[Array, "C K *X"], targets: Int[Array, " C"]
) -> Float[Array, "N K *X"]:
    """Stores `pages` at `targets`. Page and head are indexed together: slices over heads copy the pool on TPUs."""
    return pool.at[targets[:, None], jnp.arange(pool.shape[1])].set(pages)
