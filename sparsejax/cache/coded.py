"""The paged KV state of a model whose sealed pages are stored in codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax.cache.layout import Pools
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
        layout, observed, batch = self.group.layout, self.observed[layer], batch.of_group(self.group_of(layer))
        plain, q, k = q, rotate(q), rotate(k)
        (codes, opened), bounds = self.pools[layer], self.bounds[layer]
        count = batch.decode.lengths.shape[0]
        own = jnp.where(batch.decode.lengths > 0, batch.rows + 1, 0)
        opened = layout.open.write(opened, k[:count], v[:count], own, batch.offsets[:count], self.implementation)
        # A pool that is read before its last write would be copied: all writes come first.
        chunks, cut, filled = None, batch.segments, []
        if batch.prefill is not None:
            scratch = self._chunk_pages(opened, k[count:], v[count:], batch)
            opened = layout.open.take(opened, scratch, cut.last, _open_pages(batch))
            full = cut.lengths == layout.page_size
            filled.append((scratch, *_first(full, cut.scratch_pages, cut.pages)))
        full = batch.offsets[:count] == layout.page_size - 1
        filled.append((opened, *_first(full, own, batch.page_ids[:count])))
        for raw, sources, targets, number in filled:
            codes = layout.sealed.seal(codes, raw, sources, targets, number, self.implementation)
        if bounds is not None:
            for _, _, targets, number in filled:
                bounds = layout.sealed.bounds(bounds, codes, targets, number, self.implementation)
        view = CodedPages(*layout.sealed.view(codes), *opened, own)
        out, reused, handed = self._decode(layer, q[:count], view, bounds, batch)
        if batch.prefill is not None:
            chunks, rows = CodedChunks(layout.sealed, codes, *scratch, cut), batch.prefill
            lists = (*rows.page_list(layout.page_size), rows.lengths, rows.query_starts)
            out = jnp.concatenate([out, chunks.attention(q[count:], *lists, **self._options(layer))[0]])
        if observed is not None:
            observed = observed.with_step(plain, q, view, chunks, batch, self._options(layer))
        return out, self._with_layer(layer, (codes, opened), bounds, reused, observed, handed)

    def plain_pages(
        self, layer: int, row: Int[Array, ""], page_ids: Int[Array, " S"], length: Int[Array, ""]
    ) -> tuple[Pools, Int[Array, " S"]]:
        """A scratch pool with the row's tokens as attention reads them: sealed pages decoded, then the open one."""
        layout, (codes, opened) = self.group.layout, self.pools[layer]
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
        layout, (codes, opened), bounds = self.group.layout, self.pools[layer], self.bounds[layer]
        full, rest = jnp.divmod(count, layout.page_size)
        picked = layout.open.pick(*plain, slots, len(new_pages))
        sources = jnp.arange(len(new_pages), dtype=jnp.int32)
        codes = layout.sealed.seal(codes, picked, sources, new_pages, full, self.implementation)
        if bounds is not None:
            bounds = layout.sealed.bounds(bounds, codes, new_pages, full, self.implementation)
        tail = jnp.minimum(full, len(new_pages) - 1), jnp.where(rest > 0, row + 1, 0)
        opened = layout.open.take(opened, picked, *(page[None] for page in tail))
        observed = self.observed[layer].with_tokens_moved(page_ids, slots, new_pages)
        return self._with_layer(layer, (codes, opened), bounds, self.lists[layer], observed, self.handed)

    def _chunk_pages(self, opened: Pools, k: Array, v: Array, batch: StepBatch) -> Pools:
        """A scratch pool with the page of each segment: the row's open page first, then the chunk's tokens."""
        cut, layout = batch.segments, self.group.layout.open
        layout = layout.with_pages(len(cut.lengths) + 1)
        scratch = layout.take(layout.zeros(), opened, _open_pages(batch), cut.first)
        offsets = batch.offsets[-len(cut.scratch) :]
        return layout.write(scratch, k, v, cut.scratch, offsets, self.implementation)


def _first(full: Array, sources: Int[Array, " S"], targets: Int[Array, " S"]) -> tuple[Array, Array, Array]:
    """Sources and targets with those of full pages first, and how many these are."""
    order = jnp.argsort(~full)
    return sources[order], targets[order], full.sum(dtype=jnp.int32)


def _open_pages(batch: StepBatch) -> Int[Array, " R"]:
    """The open page of each row that has a chunk, the dump page for others."""
    return jnp.where(batch.prefill.lengths > 0, batch.chunk_rows + 1, 0)
