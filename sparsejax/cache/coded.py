"""The paged KV state of a model whose sealed pages are stored in codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.cache.codecs.quantized import Codes
from sparsejax.cache.layout import DenseLayout, Pools
from sparsejax.cache.paged import PagedKV, StepBatch
from sparsejax.cache.segments import Segments
from sparsejax.cache.views import CodedChunks, CodedPages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodedKV(PagedKV):
    """`PagedKV` over a `CodedLayout`: `pools` holds the codes and the open pages of each layer.

    A query at position t reads its own page in the model's dtype and every earlier page in codes, also inside
    its own chunk. So what it sees depends on its position only, and results do not depend on chunks, neighbours
    or preemption.
    """

    def planned(self, batch: StepBatch) -> StepBatch:
        """`batch` with its chunks cut at page borders."""
        if batch.prefill is None:
            return batch
        chunk = slice(batch.decode.lengths.shape[0], None)
        starts, size = batch.prefill.query_starts, self.group.layout.page_size
        segments = Segments.of(batch.page_ids[chunk], batch.offsets[chunk], starts, size)
        return replace(batch, segments=segments, deeper=tuple(map(self.planned, batch.deeper)))

    def parts(self) -> dict[str, Any]:
        sealed, opened = zip(*self.pools, strict=True)
        return super().parts() | {"kv_pages": sealed, "open_pages": opened}

    def page_arrays(self) -> Any:
        return tuple(sealed for sealed, _ in self.pools), self.bounds

    def with_page_arrays(self, arrays: Any) -> CodedKV:
        sealed, bounds = arrays
        opened = (opened for _, opened in self.pools)
        return replace(self, pools=tuple(zip(sealed, opened, strict=True)), bounds=bounds)

    def row_arrays(self, row: Int[Array, ""]) -> Any:
        """As `PagedKV.row_arrays`, and the row's open pages."""
        opened = (opened for _, opened in self.pools)
        return super().row_arrays(row), tuple(jax.tree.map(lambda pool: pool[row + 1], pools) for pools in opened)

    def with_row_arrays(self, row: Int[Array, ""], arrays: Any) -> CodedKV:
        queries, pages = arrays
        pools = tuple(
            (sealed, jax.tree.map(lambda pool, page: pool.at[row + 1].set(page), opened, new))
            for (sealed, opened), new in zip(self.pools, pages, strict=True)
        )
        return replace(super().with_row_arrays(row, queries), pools=pools)

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        batch: StepBatch,
        rotate: Callable[[Array], Array],
    ) -> tuple[Float[Array, "T H D"], CodedKV]:
        """Writes the step's rotated keys and values, seals the pages that they fill, then reads each row's pages."""
        layout, observed, batch = self.layout_of(layer), self.observed[layer], batch.of_group(self.group_of(layer))
        plain, q, k = q, rotate(q), rotate(k)
        codes, bounds, count = self.pools[layer][0], self.bounds[layer], batch.decode.lengths.shape[0]
        opened, scratch, filled = self._write(layer, k, v, batch)
        # A pool that is read before its last write would be copied: all writes come first.
        codes = self._seal(layer, codes, filled, batch)
        if bounds is not None:
            for pages in filled:
                bounds = layout.sealed.bounds(bounds, codes, pages.targets, pages.count, self.implementation)
        chunks, view = None, self._view(layer, codes, opened, batch)
        out, reused, handed = self._decode(layer, q[:count], view, bounds, batch)
        if batch.prefill is not None:
            chunks, rows = self._chunks(layer, codes, scratch, batch), batch.prefill
            lists = (*rows.page_list(layout.page_size), rows.lengths, rows.query_starts)
            out = jnp.concatenate([out, chunks.attention(q[count:], *lists, **self._options(layer))[0]])
        if observed is not None:
            observed = observed.with_step(plain, q, view, chunks, batch, self._options(layer))
        return out, self._with_layer(layer, (codes, opened), bounds, reused, observed, handed)

    def plain_pages(
        self, layer: int, row: Int[Array, ""], page_ids: Int[Array, " S"], length: Int[Array, ""]
    ) -> tuple[Pools, Int[Array, " S"]]:
        """A scratch pool with the row's tokens as attention reads them: sealed pages decoded, then the open one."""
        layout, (codes, opened) = self.layout_of(layer), self.pools[layer]
        full, rest = jnp.divmod(length, layout.page_size)
        ids = jnp.arange(1, len(page_ids) + 1, dtype=jnp.int32)
        scratch = layout.open.with_pages(len(ids) + 1).zeros()
        scratch = layout.sealed.open(scratch, codes, page_ids, ids, full, self.implementation)
        own = jnp.where(rest > 0, jnp.stack([row + 1, full + 1]), 0)[:, None]
        return layout.open.take(scratch, opened, *own), ids

    def keep_tokens(
        self,
        layer: int,
        row: Int[Array, ""],
        page_ids: Int[Array, " S"],
        plain: tuple[Pools, Int[Array, " S"]],
        slots: Int[Array, "K C"],
        new_pages: Int[Array, " S2"],
        count: Int[Array, ""],
    ) -> CodedKV:
        """As `PagedKV.keep_tokens`: full pages are coded anew, the tokens after them lie in the row's open page."""
        layout, (codes, opened), bounds = self.layout_of(layer), self.pools[layer], self.bounds[layer]
        full, rest = jnp.divmod(count, layout.page_size)
        picked = layout.open.pick(*plain, slots, len(new_pages))
        sources = jnp.arange(len(new_pages), dtype=jnp.int32)
        codes = layout.sealed.seal(codes, picked, sources, new_pages, full, self.implementation)
        if bounds is not None:
            bounds = layout.sealed.bounds(bounds, codes, new_pages, full, self.implementation)
        tail = jnp.minimum(full, len(new_pages) - 1), jnp.where(rest > 0, row + 1, 0)
        opened = layout.open.take(opened, picked, *(page[None] for page in tail))
        observed = self.observed[layer].with_tokens_moved(page_ids, slots, new_pages)
        return self._with_layer(layer, (codes, opened), bounds, self.carried[layer], observed, self.handed)

    def _write(self, layer: int, k: Array, v: Array, batch: StepBatch) -> tuple[Pools, Pools | None, list[Filled]]:
        """Open pages with the step's tokens, a scratch pool with the pages of its chunks, and what is full of both."""
        layout, opened = self.layout_of(layer), self.pools[layer][1]
        count, cut, scratch, filled = batch.decode.lengths.shape[0], batch.segments, None, []
        own = own_pages(batch)
        opened = layout.open.write(opened, k[:count], v[:count], own, batch.offsets[:count], self.implementation)
        if batch.prefill is not None:
            scratch = self._chunk_pages(layout.open, opened, k[count:], v[count:], batch)
            opened = layout.open.take(opened, scratch, cut.last, _open_pages(batch))
            full = cut.lengths == layout.page_size
            at = cut.rows_and_pages(batch.prefill.lengths, batch.prefill.query_starts, layout.page_size)
            filled.append(Filled.of(full, scratch, batch.prefill.page_ids, cut.scratch_pages, cut.pages, *at))
        full = batch.offsets[:count] == layout.page_size - 1
        at = jnp.arange(count, dtype=jnp.int32), (batch.decode.lengths - 1) // layout.page_size
        filled.append(Filled.of(full, opened, batch.decode.page_ids, own, batch.page_ids[:count], *at))
        return opened, scratch, filled

    def _seal(self, layer: int, codes: Codes, filled: list[Filled], batch: StepBatch) -> Codes:
        """The codes with what a step fills."""
        for pages in filled:
            lists = pages.sources, pages.targets, pages.count
            codes = self.layout_of(layer).sealed.seal(codes, pages.raw, *lists, self.implementation)
        return codes

    def _view(self, layer: int, codes: Codes, opened: Pools, batch: StepBatch) -> CodedPages:
        """What the decode rows read."""
        return CodedPages(*self.layout_of(layer).sealed.view(codes), *opened, own_pages(batch))

    def _chunk_pages(self, layout: DenseLayout, opened: Pools, k: Array, v: Array, batch: StepBatch) -> Pools:
        """A scratch pool with the page of each segment: the row's open page first, then the chunk's tokens."""
        cut = batch.segments
        layout = layout.with_pages(len(cut.lengths) + 1)
        scratch = layout.take(layout.zeros(), opened, _open_pages(batch), cut.first)
        offsets = batch.offsets[-len(cut.scratch) :]
        return layout.write(scratch, k, v, cut.scratch, offsets, self.implementation)

    def _chunks(self, layer: int, codes: Codes, scratch: Pools, batch: StepBatch) -> CodedChunks:
        """What the chunks read."""
        return CodedChunks(self.layout_of(layer).sealed, codes, *scratch, batch.segments)


class Filled(NamedTuple):
    """Full pages ``sources`` of `raw` pools, the first `count` of the lists, that go to pages ``targets``: page i is
    page ``logical[i]`` of the row whose pages are ``tables[rows[i]]``."""

    raw: Pools
    tables: Int[Array, "B S"]
    count: Int[Array, ""]
    sources: Int[Array, " M"]
    targets: Int[Array, " M"]
    rows: Int[Array, " M"]
    logical: Int[Array, " M"]

    @classmethod
    def of(cls, full: Array, raw: Pools, tables: Int[Array, "B S"], *lists: Int[Array, " M"]) -> Filled:
        """Those that are `full`, first and in their order."""
        order = jnp.argsort(~full)
        return cls(raw, tables, full.sum(dtype=jnp.int32), *(one[order] for one in lists))

    def join(self, other: Filled) -> Filled:
        """These and others, out of one pool."""
        full = [jnp.arange(len(one.sources)) < one.count for one in (self, other)]
        raw = jax.tree.map(lambda *pools: jnp.concatenate(pools), self.raw, other.raw)
        shifted = other._replace(sources=other.sources + len(self.raw[0]), rows=other.rows + len(self.tables))
        lists = (jnp.concatenate(pair) for pair in zip(self[3:], shifted[3:], strict=True))
        return Filled.of(jnp.concatenate(full), raw, jnp.concatenate([self.tables, other.tables]), *lists)


def own_pages(batch: StepBatch) -> Int[Array, " B"]:
    """The open page of each decode row, the dump page for padding."""
    return jnp.where(batch.decode.lengths > 0, batch.rows + 1, 0)


def _open_pages(batch: StepBatch) -> Int[Array, " R"]:
    """The open page of each row that has a chunk, the dump page for others."""
    return jnp.where(batch.prefill.lengths > 0, batch.chunk_rows + 1, 0)
