"""Cache groups: layers that share page tables and a codec, and how many pages a byte budget buys."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from sparsejax.cache.layout import CodedLayout, DenseLayout
from sparsejax.errors import CapacityError
from sparsejax.models.config import DecoderConfig

type Layout = DenseLayout | CodedLayout


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose tokens live in the same pages. Static: it is part of every compiled step's identity.

    Attributes:
        layers: layer indices, in order; position in this tuple is the index into the group's pools.
        layouts: physical shape of each layer's pools.
    """

    layers: tuple[int, ...]
    layouts: tuple[Layout, ...]

    @property
    def layout(self) -> Layout:
        """That of the first layer: pages, their size and heads are those of every layer."""
        return self.layouts[0]

    @classmethod
    def of_all(cls, groups: tuple[CacheGroup, ...]) -> CacheGroup:
        """The layers of all `groups` as one, which tells what a page of every layer takes."""
        layers = tuple(layer for group in groups for layer in group.layers)
        return cls(layers, tuple(layout for group in groups for layout in group.layouts))

    def split(self, bands: tuple[int, ...], num_pages: tuple[int, ...]) -> tuple[CacheGroup, ...]:
        """Groups of so many layers each, in order, with pools of so many pages."""
        ends = [*itertools.accumulate(bands)]
        parts = [(slice(end - count, end), pages) for end, count, pages in zip(ends, bands, num_pages, strict=True)]
        return tuple(
            CacheGroup(self.layers[part], tuple(layout.with_pages(pages) for layout in self.layouts[part]))
            for part, pages in parts
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers of the group."""
        return sum(layout.page_bytes for layout in self.layouts)

    @property
    def codec_bytes(self) -> dict[str, int]:
        """`page_bytes` by the codec of the layers."""
        codecs = sorted({layout.codec for layout in self.layouts})
        return {codec: sum(one.page_bytes for one in self.layouts if one.codec == codec) for codec in codecs}

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the pools besides the pages."""
        return sum(layout.fixed_bytes for layout in self.layouts)

    @property
    def row_bytes(self) -> int:
        """Bytes that a row holds besides its pages: its open page, where that is stored apart."""
        return sum(layout.row_bytes for layout in self.layouts)

    @property
    def page_tiles(self) -> int:
        """Tiles of one page: it has one for each KV head of each layer."""
        return len(self.layers) * self.layout.num_kv_heads

    def read_bytes(self, tiles: int, queries: int) -> int:
        """Bytes of so many tiles, the open page of each of `queries` queries among them.

        A tile counts as the mean over layers, which is exact where all layers read as many.
        """
        apart = queries if self.row_bytes else 0
        return (tiles - apart * self.page_tiles) * self.page_bytes // self.page_tiles + apart * self.row_bytes

    @property
    def pool_bytes(self) -> int:
        return sum(layout.pool_bytes for layout in self.layouts)


def dense_group(
    config: DecoderConfig, page_size: int, dtype: np.dtype, num_pages: int, platform: str = "cpu"
) -> CacheGroup:
    """The one group of a dense model: every layer, K and V in the model's dtype, laid out for `platform`."""
    make = DenseLayout.for_tpu if platform == "tpu" else DenseLayout.plain
    layout = make(num_pages, config.num_kv_heads, page_size, config.head_dim, dtype)
    return CacheGroup(tuple(range(config.num_layers)), (layout,) * config.num_layers)


def make_group(
    config: DecoderConfig,
    page_size: int,
    dtype: np.dtype,
    num_pages: int,
    platform: str = "cpu",
    *,
    codec: str = "dense",
    num_rows: int = 0,
) -> CacheGroup:
    """The one group of a model whose full pages are stored as `codec`, with open pages of their own for `num_rows`
    rows unless that is ``"dense"``."""
    dense = dense_group(config, page_size, dtype, num_pages, platform)
    if codec == "dense":
        return dense
    return CacheGroup(dense.layers, (CodedLayout.of(dense.layout, codec, num_rows, platform),) * len(dense.layers))


def pages_for(
    budget_bytes: int, groups: tuple[CacheGroup, ...], longest: int, num_rows: int, held: tuple[int, ...]
) -> tuple[int, ...]:
    """Pages of each group, the dump page included, that `budget_bytes` buys together.

    Each group gets room for one sequence of `longest` pages, and beside it for as many rows, up to `num_rows` in all,
    as hold `held` of its pages each.

    Raises:
        CapacityError: not even one page besides the dump page fits.
    """
    fixed = sum(group.fixed_bytes for group in groups)
    each = sum(group.page_bytes for group in groups)
    left = budget_bytes - fixed - (1 + longest) * each
    if left < 0:
        pages = (budget_bytes - fixed) // each
        if pages < 2:
            besides = f" and the open pages of {fixed} bytes" if fixed else ""
            raise CapacityError(
                f"{budget_bytes} bytes of KV memory hold no page of {each} bytes besides the spare one{besides}: give "
                f"kv_memory_bytes of at least {fixed + 2 * each}, or a smaller page_size."
            )
        return (int(pages),) * len(groups)
    row_bytes = sum(count * group.page_bytes for count, group in zip(held, groups, strict=True))
    return tuple(1 + longest + min(count * left // row_bytes, count * (num_rows - 1)) for count in held)
