"""Attention that is watched: a prompt whose keys are recorded, and decoded tokens that read it under a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import pallas_kernels
from sparsejax.cache.layout import DenseLayout, Pools
from sparsejax.cache.paged import Rows, StepBatch
from sparsejax.cache.views import DensePages
from sparsejax.evaluation import proxies
from sparsejax.models.config import DecoderConfig
from sparsejax.models.rope import rope_tables
from sparsejax.sparsity.eviction import Eviction, Keep, bands
from sparsejax.sparsity.evictor import best_slots
from sparsejax.sparsity.keep import SCORES, View
from sparsejax.sparsity.keep_rows import KeepRows, pack_keep
from sparsejax.sparsity.policy import Role
from sparsejax.sparsity.selector import Handed, Selector


@dataclass(frozen=True)
class Shape:
    """What is fixed: the model, and pages that hold the prompt and the decoded tokens."""

    model: DecoderConfig
    layout: DenseLayout

    @property
    def num_pages(self) -> int:
        """Without the page that absorbs padding."""
        return self.layout.num_pages - 1

    def options(self, layer: int) -> dict[str, Any]:
        return dict(window=self.model.windows[layer], soft_cap=self.model.attn_soft_cap)

    def pages(self, k: Float[Array, "T K D"], v: Float[Array, "T K D"]) -> Pools:
        """Pools in which token t lies in slot ``t % P`` of page ``1 + t // P``."""
        page, offset = jnp.divmod(jnp.arange(k.shape[0]), self.layout.page_size)
        return self.layout.write(self.layout.zeros(), k, v, 1 + page, offset)

    def page_ids(self) -> Array:
        return jnp.arange(1, self.layout.num_pages)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorded:
    """Dense attention over a prompt from its first token; of each layer so far the queries before rotation
    ``[T, H, D]``, the rotated keys and the values ``[T, K, D]``."""

    shape: Shape = field(metadata={"static": True})
    queries: tuple[Array, ...] = ()
    keys: tuple[Array, ...] = ()
    values: tuple[Array, ...] = ()

    def attend(
        self, layer: int, q: Array, k: Array, v: Array, batch: Any, rotate: Callable[[Array], Array]
    ) -> tuple[Float[Array, "T H D"], Recorded]:
        """Attention of all T tokens, as `models.decoder.KV` describes it."""
        keys, tokens = rotate(k), q.shape[0]
        lists = self.shape.page_ids()[None, None], jnp.full((1, 1), self.shape.num_pages)
        out = pallas_kernels.paged_prefill_attention(
            rotate(q), *self.shape.pages(keys, v), *lists, jnp.array([tokens]), jnp.array([0, tokens]),
            **self.shape.options(layer),
        )  # fmt: skip
        return out, Recorded(self.shape, (*self.queries, q), (*self.keys, keys), (*self.values, v))

    def kept(self, keep: Keep) -> tuple[Bool[Array, "K T"], ...]:
        """Per layer and KV head, the tokens of the prompt that stay when it has been read."""
        layers = bands([keep], len(self.keys))
        eviction = keep.eviction(len(self.keys[0]), layers)
        budgets = [None] * len(self.keys)
        if eviction is not None:
            budgets = [kept for kept, count in zip(eviction.kept, layers, strict=True) for _ in range(count)]
        return tuple(self._kept(layer, keep, eviction, kept) for layer, kept in enumerate(budgets))

    def _kept(self, layer: int, keep: Keep, eviction: Eviction | None, kept: int | None) -> Bool[Array, "K T"]:
        tokens, heads = self.keys[layer].shape[:2]
        if eviction is None or eviction.at > tokens:
            return jnp.ones((heads, tokens), bool)
        rows = KeepRows(**{name: jnp.asarray(value)[None] for name, value in pack_keep(keep, 0, eviction).items()})
        positions = rows.positions(jnp.array(0), jnp.array(tokens), keep.window)
        model = self.shape.model
        view = View(
            *self.shape.pages(self.keys[layer], self.values[layer]), self.shape.page_ids(), jnp.array(tokens),
            self.queries[layer][jnp.maximum(positions, 0)], positions, None, jnp.array(tokens),
            keep.pool, lambda at: rope_tables(model.rope, model.head_dim, at), {"soft_cap": model.attn_soft_cap},
        )  # fmt: skip
        length, stay = jnp.array(tokens), jnp.array(kept)
        scores = (keep.method if callable(keep.method) else SCORES[keep.method])(view)
        slots = jnp.broadcast_to(scores, (heads, self.shape.num_pages * self.shape.layout.page_size))
        best = best_slots(slots, length, stay, rows.sink[0], rows.recent[0], kept)
        return jnp.zeros((heads, tokens), bool).at[jnp.arange(heads)[:, None], best].set(True, mode="drop")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Watched:
    """Attention of B tokens that follow a prompt, each as a decode step of its own would read it.

    Attributes:
        prompt: the prompt's keys and values.
        kept: per layer, the tokens of the prompt that are in the cache ``[K, T]``.
        recall, error: of the layers so far, ``[B, H]`` against dense attention of the same queries.
        selector: what decode steps read; None is everything.
    """

    prompt: Recorded
    kept: tuple[Bool[Array, "K T"], ...]
    selector: Selector | None = field(metadata={"static": True})
    recall: tuple[Array, ...] = ()
    error: tuple[Array, ...] = ()
    handed: Handed | None = None

    def attend(
        self, layer: int, q: Array, k: Array, v: Array, batch: StepBatch, rotate: Callable[[Array], Array]
    ) -> tuple[Float[Array, "B H D"], Watched]:
        """Attention of the B tokens, as `models.decoder.KV` describes it."""
        shape, dtype = self.prompt.shape, q.dtype
        q = rotate(q)
        k = jnp.concatenate([self.prompt.keys[layer], rotate(k)])
        v = jnp.concatenate([self.prompt.values[layer], v])
        age = batch.positions[:, None] - jnp.arange(k.shape[0])
        window = shape.model.windows[layer]
        visible = (age >= 0) & (age < (window or k.shape[0]))
        dense = proxies.attention_weights(q, k, visible, shape.model.attn_soft_cap)
        selected, handed = self._selected(layer, q, k, v, batch)
        cached = jnp.pad(self.kept[layer], ((0, 0), (0, len(batch.tokens))), constant_values=True)
        sparse, recall = proxies.restricted(dense, selected & cached)
        out, exact = (proxies.mixed(weights, v) for weights in (sparse, dense))
        error = proxies.output_error(out, exact)
        after = replace(self, recall=(*self.recall, recall), error=(*self.error, error), handed=handed)
        return out.astype(dtype), after

    def _selected(
        self, layer: int, q: Array, k: Array, v: Array, batch: StepBatch
    ) -> tuple[Bool[Array, "B K T"], Handed | None]:
        """Which tokens each row's pages hold, by KV head."""
        heads, rows = k.shape[1], len(batch.tokens)
        if self.selector is None:
            return jnp.ones((rows, heads, k.shape[0]), bool), None
        shape, policy = self.prompt.shape, batch.policy
        pools = shape.pages(k, v)
        full = jnp.where(jnp.arange(1, shape.num_pages + 1) * shape.layout.page_size <= k.shape[0], shape.page_ids(), 0)
        bounds = self.selector.seal_pages(self.selector.initial_bounds(shape.layout), pools, full)
        options = shape.options(layer) | {"implementation": None}
        empty = self.selector.initial_carried(rows, shape.layout)
        _, _, handed = self.selector.read(layer, q, DensePages(*pools), bounds, batch, empty, self.handed, options)
        place = jnp.arange(handed.lists.ids.shape[2])
        listed = jnp.where(place < handed.lists.counts[..., None], handed.lists.ids, shape.num_pages)
        pages = jnp.zeros((rows, listed.shape[1], shape.num_pages), bool)
        pages = pages.at[jnp.arange(rows)[:, None, None], jnp.arange(listed.shape[1])[:, None], listed].set(
            True, mode="drop"
        )
        role = policy.roles[:, layer]
        reads_all = (batch.decode.page_list(shape.layout.page_size)[1][:, 0] <= policy.budget) | (
            (role == Role.READ_ALL) | (role == Role.SELECT_READ_ALL)
        )
        chosen = jnp.repeat(pages | reads_all[:, None, None], shape.layout.page_size, axis=2)[..., : k.shape[0]]
        return jnp.broadcast_to(chosen, (rows, heads, k.shape[0])), handed


def decode_batch(shape: Shape, tokens: Array, start: int, policy: Any) -> StepBatch:
    """B tokens from position `start` on, each a row of its own over the same pages."""
    positions = start + jnp.arange(len(tokens))
    page, offset = jnp.divmod(positions, shape.layout.page_size)
    page_ids = jnp.broadcast_to(shape.page_ids(), (len(tokens), shape.num_pages))
    rows = jnp.arange(len(tokens))
    return StepBatch(tokens, positions, 1 + page, offset, Rows(page_ids, positions + 1), rows=rows, policy=policy)
