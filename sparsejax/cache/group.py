"""Cache groups: layers that share page tables and a codec, and how many pages a byte budget buys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsejax.cache.layout import DenseLayout
from sparsejax.errors import CapacityError
from sparsejax.models.config import DecoderConfig


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose tokens live in the same pages. Static: it is part of every compiled step's identity.

    Attributes:
        layers: layer indices, in order; position in this tuple is the index into the group's pools.
        layout: physical shape of each layer's pools.
    """

    layers: tuple[int, ...]
    layout: DenseLayout

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers of the group."""
        return len(self.layers) * self.layout.page_bytes

    @property
    def page_tiles(self) -> int:
        """Tiles of one page: it has one for each KV head of each layer."""
        return len(self.layers) * self.layout.num_kv_heads

    @property
    def pool_bytes(self) -> int:
        return len(self.layers) * self.layout.pool_bytes


def dense_group(
    config: DecoderConfig, page_size: int, dtype: np.dtype, num_pages: int, platform: str = "cpu"
) -> CacheGroup:
    """The one group of a dense model: every layer, K and V in the model's dtype, laid out for `platform`."""
    make = DenseLayout.for_tpu if platform == "tpu" else DenseLayout.plain
    layout = make(num_pages, config.num_kv_heads, page_size, config.head_dim, dtype)
    return CacheGroup(tuple(range(config.num_layers)), layout)


def pages_for(budget_bytes: int, group: CacheGroup, wanted: int) -> int:
    """Pages, the dump page included, that `budget_bytes` buys, at most `wanted` plus the dump page.

    Raises:
        CapacityError: not even one page besides the dump page fits.
    """
    pages = min(budget_bytes // group.page_bytes, wanted + 1)
    if pages < 2:
        raise CapacityError(
            f"{budget_bytes} bytes of KV memory hold no page of {group.page_bytes} bytes besides the spare one: "
            f"give kv_memory_bytes of at least {2 * group.page_bytes}, or a smaller page_size."
        )
    return int(pages)
