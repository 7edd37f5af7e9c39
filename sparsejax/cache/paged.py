"""The paged KV state of a model and how a layer writes to it and reads from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.dispatch import Implementation
from sparsejax.cache.group import CacheGroup
from sparsejax.cache.layout import CodedLayout, DenseLayout, Pools
from sparsejax.cache.views import CodedPages, DensePages


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Page lists of the sequences that a section of a step reads. Counts are data: work follows them.

    Attributes:
        page_ids: physical ids by logical index; what lies beyond ``counts`` is never read.
        lengths: tokens of each row that are in pages once this step's own are written; 0 is an empty row.
        query_starts: row b's queries are ``query_starts[b] : query_starts[b + 1]`` of the section; None when
            each row has exactly one query.
    """

    page_ids: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    query_starts: Int[Array, " B1"] | None = None

    def page_list(self, page_size: int) -> tuple[Int[Array, "B 1 S"], Int[Array, "B 1"]]:
        """The list of all pages of each row, the same for every head: dense attention."""
        return self.page_ids[:, None], (-(-self.lengths // page_size))[:, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBatch:
    """The flat tokens of one step: first one per decode row, then the prefill chunks.

    Attributes:
        page_ids, offsets: where each token's key and value go; page 0 for padding.
        decode: rows of the first ``len(decode.lengths)`` tokens.
        prefill: rows of the tokens after them, or None.
        rows, chunk_rows: numbers of the decode rows, and of the rows of the chunks, in the device state.
        policy: what the decode rows read, for the selector.
        observe: what `observed` takes in of the step's queries (a `sparsity.seen.Observe`); None where nothing is.
        segments: how the chunks lie in pages, where the KV object asks for it (`planned`).
        compressor: by layer, the weights that its codec needs; None where none does.
        deeper: the same step in the pages of each further cache group.
    """

    tokens: Int[Array, " T"]
    positions: Int[Array, " T"]
    page_ids: Int[Array, " T"]
    offsets: Int[Array, " T"]
    decode: Rows
    prefill: Rows | None = None
    rows: Int[Array, " B"] | None = None
    chunk_rows: Int[Array, " B"] | None = None
    policy: Any = None
    observe: Any = None
    segments: Any = None
    compressor: Any = None
    deeper: tuple[StepBatch, ...] = ()

    def of_group(self, index: int) -> StepBatch:
        """The step in the pages of a cache group."""
        return self.deeper[index - 1] if index else self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKV:
    """Pools of every layer, and the static facts that attention over them needs.

    Attributes:
        pools: per layer, K and V as the group's layout stores them.
        windows: per layer, the sliding window in tokens, or None.
        bounds: per layer, what the selector keeps of sealed pages, or None.
        carried: per layer, what the selector carries of rows from step to step, or None.
        handed: what the selector hands from layer to layer; None between steps.
        observed: per layer, what eviction will look at (a `sparsity.seen.Seen`), or None.
        implementation: which backend serves the operations; None picks the best.
        selector: what decode rows read (a `sparsity.selector.Selector`); None reads all pages.
        group: of the first layers; `deeper` are those of the layers after them, where they have tables of their own.
    """

    pools: tuple[Pools, ...]
    bounds: tuple[Array | None, ...]
    carried: tuple[Any, ...]
    observed: tuple[Any, ...]
    group: CacheGroup = field(metadata={"static": True})
    windows: tuple[int | None, ...] = field(metadata={"static": True})
    soft_cap: float | None = field(default=None, metadata={"static": True})
    implementation: Implementation = field(default=None, metadata={"static": True})
    selector: Any = field(default=None, metadata={"static": True})
    handed: Any = None
    deeper: tuple[CacheGroup, ...] = field(default=(), metadata={"static": True})

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return (self.group, *self.deeper)

    def group_of(self, layer: int) -> int:
        """Index of the cache group of a layer."""
        return next(index for index, group in enumerate(self.groups) if layer in group.layers)

    def layout_of(self, layer: int) -> DenseLayout | CodedLayout:
        """Physical shape of the pools of a layer."""
        group = self.groups[self.group_of(layer)]
        return group.layouts[group.layers.index(layer)]

    def planned(self, batch: StepBatch) -> StepBatch:
        """`batch` with what every layer would otherwise work out for itself; dense pages need nothing."""
        return batch

    def parts(self) -> dict[str, Any]:
        """Its arrays by component."""
        blocks = [carried and carried.blocks for carried in self.carried]
        return {"kv_pages": self.pools, "page_bounds": (self.bounds, blocks), "observed_attention": self.observed}

    def attend(
        self,
        layer: int,
        q: Float[Array, "T H D"],
        k: Float[Array, "T K D"],
        v: Float[Array, "T K D"],
        batch: StepBatch,
        rotate: Callable[[Array], Array],
    ) -> tuple[Float[Array, "T H D"], PagedKV]:
        """Writes the step's rotated keys and values, then reads each row's page list.

        What a query sees depends on its position only: every token at or before it (inside the window).
        """
        layout, observed, batch = self.layout_of(layer), self.observed[layer], batch.of_group(self.group_of(layer))
        pools = layout.write(
            self.pools[layer], rotate(k), v, batch.page_ids, batch.offsets, self.implementation
        )
        plain, q = q, rotate(q)
        if observed is not None:
            pages = DensePages(*pools)
            observed = observed.with_step(plain, q, pages, pages, batch, self._options(layer))
        decode_count, bounds = batch.decode.lengths.shape[0], self.bounds[layer]
        if self.selector is not None:
            bounds = self.selector.seal(bounds, pools, batch.page_ids, batch.offsets, decode_count)
        out, reused, handed = self._decode(layer, q[:decode_count], DensePages(*pools), bounds, batch)
        if batch.prefill is not None:
            rows = batch.prefill
            chunk = pallas_kernels.paged_prefill_attention(
                q[decode_count:],
                *pools,
                *rows.page_list(layout.page_size),
                rows.lengths,
                rows.query_starts,
                **self._options(layer),
            )
            out = jnp.concatenate([out, chunk])
        return out, self._with_layer(layer, pools, bounds, reused, observed, handed)

    def page_arrays(self) -> Any:
        """All that full pages consist of: by layer, trees of arrays ``[N, ...]`` by page id."""
        return self.pools, self.bounds

    def with_page_arrays(self, arrays: Any) -> PagedKV:
        """The same state with `arrays` in place of its `page_arrays`."""
        pools, bounds = arrays
        return replace(self, pools=pools, bounds=bounds)

    def copy_pages(self, source: Int[Array, "Gr C"], target: Int[Array, "Gr C"]) -> PagedKV:
        """Copies whole pages of each group, ``source[g, i] -> target[g, i]``; pairs of page 0 are padding."""
        at = [self.group_of(layer) for layer in range(len(self.pools))]

        def copied(g: int, arrays: Any) -> Any:
            return jax.tree.map(lambda array: array.at[target[g]].set(array[source[g]]), arrays)

        by_layer = (tuple(map(copied, at, arrays)) for arrays in self.page_arrays())
        return self.with_page_arrays(tuple(by_layer))

    def row_arrays(self, row: Int[Array, ""]) -> Any:
        """What a row holds besides its pages: by layer, the queries that its next eviction looks at."""
        return tuple(None if seen is None or seen.queries is None else seen.queries[row] for seen in self.observed)

    def with_row_arrays(self, row: Int[Array, ""], arrays: Any) -> PagedKV:
        """The same state where `row` holds what `row_arrays` gave for another row."""
        pairs = zip(self.observed, arrays, strict=True)
        observed = (one if new is None else replace(one, queries=one.queries.at[row].set(new)) for one, new in pairs)
        return replace(self, observed=tuple(observed))

    def plain_pages(
        self, layer: int, row: Int[Array, ""], page_ids: Int[Array, " S"], length: Int[Array, ""]
    ) -> tuple[Pools, Int[Array, " S"]]:
        """Pools in which the first `length` tokens of a row lie in the model's dtype, and the row's pages in them."""
        return self.pools[layer], page_ids

    def keep_tokens(
        self,
        layer: int,
        row: Int[Array, ""],
        page_ids: Int[Array, " S"],
        plain: tuple[Pools, Int[Array, " S"]],
        slots: Int[Array, "K C"],
        new_pages: Int[Array, " S2"],
        count: Int[Array, ""],
    ) -> PagedKV:
        """Moves the first `count` of the tokens at `slots`, per KV head, to the head of a row's `new_pages`.

        Args:
            page_ids: the row's pages so far; `plain`: what `plain_pages` gave for them.
        """
        picked = self.group.layout.pick(*plain, slots, len(new_pages))
        pools = self.group.layout.put(self.pools[layer], picked, new_pages)
        bounds = self.bounds[layer]
        if self.selector is not None:
            bounds = self.selector.seal_pages(bounds, pools, self._full_pages(new_pages, count))
        observed = self.observed[layer].with_tokens_moved(page_ids, slots, new_pages)
        return self._with_layer(layer, pools, bounds, self.carried[layer], observed, self.handed)

    def _full_pages(self, pages: Int[Array, " S"], num_tokens: Int[Array, ""]) -> Int[Array, " S"]:
        """Those of `pages` that so many tokens fill, page 0 for the others."""
        return jnp.where(jnp.arange(len(pages)) < num_tokens // self.group.layout.page_size, pages, 0)

    def without_row(self, row: Int[Array, ""]) -> PagedKV:
        """Forgets what is carried of a row's earlier steps: another sequence takes it."""
        return replace(self, carried=tuple(None if c is None else c.without(row) for c in self.carried))

    def end_step(self) -> tuple[PagedKV, Any]:
        """The state for the next step, and what the layers of this one handed on; None without a selector."""
        return replace(self, handed=None), self.handed

    def _decode(
        self,
        layer: int,
        q: Float[Array, "B H D"],
        pages: DensePages | CodedPages,
        bounds: Array | None,
        batch: StepBatch,
    ) -> tuple[Float[Array, "B H D"], Any, Any]:
        """Attention of the decode rows, what the selector carries to the next step, and what it hands on."""
        rows, options = batch.decode, self._options(layer)
        if self.selector is None:
            everything = rows.page_list(self.group.layout.page_size)
            return pages.attention(q, *everything, rows.lengths, **options), self.carried[layer], None
        return self.selector.read(layer, q, pages, bounds, batch, self.carried[layer], self.handed, options)

    def _options(self, layer: int) -> dict[str, Any]:
        """Of the layer's attention."""
        return dict(window=self.windows[layer], soft_cap=self.soft_cap, implementation=self.implementation)

    def _with_layer(
        self, layer: int, pools: Pools, bounds: Array | None, carried: Any, observed: Any, handed: Any
    ) -> PagedKV:
        def put(values: tuple, value: Any) -> tuple:
            return (*values[:layer], value, *values[layer + 1 :])

        return replace(
            self,
            pools=put(self.pools, pools),
            bounds=put(self.bounds, bounds),
            carried=put(self.carried, carried),
            observed=put(self.observed, observed),
            handed=handed,
        )
