"""Cuts the cache of a row to the tokens that its policy keeps, in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sparsejax.cache.layout import CodedLayout, DenseLayout
from sparsejax.cache.paged import PagedKV
from sparsejax.models.config import DecoderConfig
from sparsejax.models.rope import rope_tables
from sparsejax.sparsity.eviction import Keep, bands
from sparsejax.sparsity.keep import SCORES, View
from sparsejax.sparsity.keep_rows import KeepRows
from sparsejax.sparsity.seen import Seen


@dataclass(frozen=True)
class Evictor:
    """The ways to evict that an engine declared: a static part of its eviction program.

    Attributes:
        methods: method, observed queries and pooling width of each (`Keep.compiled`).
        capacity: pages that hold the most tokens any row keeps.
        num_observed: queries that are stored per row.
        counts: whether some method counts all attention.
    """

    methods: tuple[tuple[str | Callable[[View], Array], int, int], ...]
    capacity: int
    num_observed: int
    counts: bool
    model: DecoderConfig

    @classmethod
    def of(cls, keeps: tuple[Keep, ...], model: DecoderConfig, page_size: int, max_model_len: int) -> Evictor | None:
        """The evictor that serves `keeps`; None if none of them ever evicts."""
        evicting = [keep for keep in keeps if keep.method != "all"]
        if not evicting:
            return None
        layers = bands(keeps, model.num_layers)
        most = min(max(keep.most_kept(max_model_len, layers) for keep in evicting), max_model_len)
        methods = tuple(dict.fromkeys(keep.compiled for keep in evicting))
        observed = max((keep.window for keep in evicting if keep.observes in ("last", "spread")), default=0)
        counts = any(keep.observes == "all" for keep in evicting)
        return cls(methods, -(-most // page_size), observed, counts, model)

    def nothing_seen(self, num_rows: int, layout: DenseLayout | CodedLayout) -> Seen:
        """Room for what one layer observes."""
        queries = (num_rows, self.num_observed, self.model.num_heads, self.model.head_dim)
        mass = (layout.num_pages, layout.num_kv_heads, layout.page_size)
        return Seen(
            jnp.zeros(queries, layout.dtype) if self.num_observed else None, jnp.zeros(mass) if self.counts else None
        )

    def evict(
        self,
        kv: PagedKV,
        rows: KeepRows,
        row: Int[Array, ""],
        page_ids: Int[Array, "Gr S"],
        length: Int[Array, " Gr"],
        kept: Int[Array, " Gr"],
        at: Int[Array, ""],
        new_pages: Int[Array, "Gr C"],
    ) -> PagedKV:
        """Copies the `kept` best of `length` tokens of one row to `new_pages`, per layer and KV head, in order.

        Args:
            page_ids: the row's pages in each cache group; `at`: its tokens computed so far, evicted ones included.
            new_pages: pages for the tokens that stay; page 0 fills the rest.
        """
        groups = [(page_ids[g], length[g], kept[g], new_pages[g]) for g in range(len(kv.groups))]
        its, positions = rows.at(row), rows.positions(row, at, self.num_observed)
        for layer in range(len(kv.pools)):
            seen, (page_ids, length, kept, new_pages) = kv.observed[layer], groups[kv.group_of(layer)]
            queries = jnp.zeros((0, self.model.num_heads, self.model.head_dim))
            pools, ids = kv.plain_pages(layer, row, page_ids, length)
            view = View(
                *pools, ids, length, queries if seen.queries is None else seen.queries[row], positions,
                seen.of_row(page_ids), at, 1, self._rope,
                {"soft_cap": kv.soft_cap, "implementation": kv.implementation},
            )  # fmt: skip
            shape = kv.group.layout.num_kv_heads, page_ids.shape[0] * view.page_size
            branches = [self._scores(method, view, shape) for method in self.methods]
            scores = lax.switch(its.method, branches)
            slots = best_slots(scores, length, kept, its.sink, its.recent, self.capacity * view.page_size)
            kv = kv.keep_tokens(layer, row, page_ids, (pools, ids), slots, new_pages, kept)
        return kv

    def _scores(self, method: tuple, view: View, shape: tuple[int, int]) -> Callable[[], Array]:
        name, window, pool = method
        score = name if callable(name) else SCORES[name]
        its = view._replace(queries=view.queries[:window], positions=view.positions[:window], pool=pool)
        return lambda: jnp.broadcast_to(score(its).astype(jnp.float32), shape)

    def _rope(self, positions: Int[Array, " T"]) -> tuple[Array, Array]:
        return rope_tables(self.model.rope, self.model.head_dim, positions)


def best_slots(
    scores: Float[Array, "K U"],
    length: Int[Array, ""],
    kept: Int[Array, ""],
    sink: Int[Array, ""],
    recent: Int[Array, ""],
    most: int,
) -> Int[Array, "K C"]:
    """Slots of the `kept` largest scores among `length` tokens, ascending, padded with U to C = `most`.

    The first `sink` and the last `recent` tokens come first, then larger scores; of equal ones the earlier.
    """
    slots = jnp.arange(scores.shape[1])
    pinned = (slots < sink) | (slots >= length - recent)
    ranked = jnp.where(slots < length, jnp.where(pinned, jnp.inf, scores), -jnp.inf)
    most = min(most, scores.shape[1])
    best = lax.top_k(ranked, most)[1]
    return jnp.sort(jnp.where(jnp.arange(most) < kept, best, scores.shape[1]), axis=-1)
