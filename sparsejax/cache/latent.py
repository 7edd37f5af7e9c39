"""The paged KV state of a model under DeltaKV: most layers hold latents, the filter layers pages of another codec."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.deltakv_pools import DeltaPools
from sparsejax.cache.coded import CodedKV, Filled, own_pages
from sparsejax.cache.layout import DenseLayout, Pools
from sparsejax.cache.paged import PagedKV, StepBatch
from sparsejax.cache.views import CodedChunks, CodedPages, LatentChunks, LatentPages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentKV(CodedKV):
    """`CodedKV` whose layers differ in how they store pages; ids, tables and open pages are those of all layers.

    Latents are read with their layer's compressor (``batch.compressor[layer]``) and with the row's whole page table,
    which finds the centers of earlier pages. Layers of latents never select: they read all, or the list of a filter
    layer before them.
    """

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        batch: StepBatch,
        rotate: Callable[[Array], Array],
    ) -> tuple[Float[Array, "T H D"], LatentKV]:
        """As the layer's layout does; see `PagedKV` and `CodedKV`."""
        dense = isinstance(self.layout_of(layer), DenseLayout)
        return (PagedKV if dense else CodedKV).attend(self, layer, q, k, v, batch, rotate)

    def parts(self) -> dict[str, Any]:
        found: dict[str, list[Any]] = {"kv_pages": [], "latent_pages": [], "open_pages": []}
        for layout, pools in zip(self.group.layouts, self.pools, strict=True):
            sealed, opened = (pools, None) if isinstance(layout, DenseLayout) else pools
            found["latent_pages" if layout.latent else "kv_pages"].append(sealed)
            found["open_pages"].append(opened)
        return PagedKV.parts(self) | found

    def page_arrays(self) -> Any:
        stored = zip(self.group.layouts, self.pools, strict=True)
        return tuple(pools if isinstance(layout, DenseLayout) else pools[0] for layout, pools in stored), self.bounds

    def with_page_arrays(self, arrays: Any) -> LatentKV:
        stored, bounds = arrays
        pools = (
            new if isinstance(layout, DenseLayout) else (new, old[1])
            for layout, new, old in zip(self.group.layouts, stored, self.pools, strict=True)
        )
        return replace(self, pools=tuple(pools), bounds=bounds)

    def _seal(self, layer: int, codes: DeltaPools, filled: list[Filled], batch: StepBatch) -> DeltaPools:
        layout = self.layout_of(layer)
        if not layout.latent:
            return super()._seal(layer, codes, filled, batch)
        pages = functools.reduce(Filled.join, filled)  # a second loop over the pools would copy them
        lists = (pages.sources, pages.targets, pages.tables, pages.rows, pages.logical, pages.count)
        return layout.sealed.seal(codes, batch.compressor[layer], pages.raw, *lists, self.implementation)

    def _view(self, layer: int, codes: DeltaPools, opened: Pools, batch: StepBatch) -> CodedPages | LatentPages:
        layout = self.layout_of(layer)
        if not layout.latent:
            return super()._view(layer, codes, opened, batch)
        return LatentPages(
            layout.sealed, codes, batch.compressor[layer], batch.decode.page_ids, *opened, own_pages(batch)
        )

    def _decode(
        self, layer: int, q: Float[Array, "B H D"], pages: Any, bounds: Array | None, batch: StepBatch
    ) -> tuple[Float[Array, "B H D"], Any, Any]:
        if self.selector is None or not self.layout_of(layer).latent:
            return super()._decode(layer, q, pages, bounds, batch)
        out, handed = self.selector.follow(layer, q, pages, batch, self.handed, self._options(layer))
        return out, self.carried[layer], handed

    def _chunks(
        self, layer: int, codes: DeltaPools, scratch: Pools, batch: StepBatch
    ) -> CodedChunks | LatentChunks:
        layout = self.layout_of(layer)
        if not layout.latent:
            return super()._chunks(layer, codes, scratch, batch)
        return LatentChunks(layout.sealed, codes, batch.compressor[layer], *scratch, batch.segments)

    def _options(self, layer: int) -> dict[str, Any]:
        options = super()._options(layer)
        if self.layout_of(layer).latent:
            del options["window"]  # refused where an engine is built: no layer of latents has one
        return options
