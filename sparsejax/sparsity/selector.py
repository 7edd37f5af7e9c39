"""What the decode rows of a step read in each layer: all of their pages, or what their own policy selects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import pallas_kernels
from sparsejax.cache.layout import CodedLayout, DenseLayout, Pools
from sparsejax.cache.paged import StepBatch
from sparsejax.cache.views import CodedPages, DensePages, LatentPages
from sparsejax.errors import ConfigError
from sparsejax.sparsity.blocks import Blocks, ends, pays
from sparsejax.sparsity.choice import candidates, choose
from sparsejax.sparsity.kinds import ALL, Select
from sparsejax.sparsity.lists import Carried, Lists
from sparsejax.sparsity.policy import Role, SparsityConfig, selects_of
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select import Query


class Handed(NamedTuple):
    """What a layer hands on to the next one within a step: the rows' lists, the tiles (a page of one KV head of one
    layer) that they hold and have read so far, how many lists a `top_p` made for them and how many of these fill the
    whole budget, and the share of each layer's attention probability that they
    captured (mean over heads; -1: not measured)."""

    lists: Lists
    tiles: Int[Array, "B 2"]
    capped: Int[Array, "B 2"]
    recall: Float[Array, "B L"]

    @classmethod
    def first(cls, lists: Lists, num_layers: int) -> Handed:
        rows = len(lists.counts)
        nothing = jnp.zeros((rows, 2), jnp.int32)
        return cls(lists, nothing, nothing, jnp.full((rows, num_layers), -1.0))


@dataclass(frozen=True)
class Selector:
    """What the policies of an engine have in common: a static part of every compiled step.

    Attributes:
        selects: those that requests may choose, reading all first.
        page_size: tokens of a page.
        longest: pages of the longest sequence.
        width: pages of the longest list.
        heads: lists of a row: one per KV head, or 1 where every declared policy shares its lists.
        keeps: whether lists serve more than one step.
        block: pages of a block whose bounds are scored first; 0 where no policy has blocks.
        blocks: blocks whose pages are scored then, at most.
        samples: whether recall is measured.
    """

    selects: tuple[Select, ...]
    page_size: int
    longest: int
    width: int
    heads: int
    keeps: bool
    block: int
    blocks: int
    samples: bool

    @classmethod
    def of(
        cls, policies: tuple[SparsityConfig, ...], page_size: int, num_kv_heads: int, max_model_len: int
    ) -> Selector | None:
        """The selector that serves `policies`; None if all of them read everything."""
        selecting = [policy for policy in policies if policy.kind is not ALL]
        if not selecting:
            return None
        longest = -(-max_model_len // page_size)
        sizes = sorted({policy.block for policy in selecting if policy.block})
        if len(sizes) > 1:
            raise ConfigError(
                f"sparsity names blocks of {' and '.join(map(str, sizes))} pages, but an engine keeps bounds of one "
                "size: give every policy the same block, or 0."
            )
        block = sizes[0] if sizes else 0
        return cls(
            selects_of(policies),
            page_size,
            longest,
            min(longest, max(policy.page_counts(max_model_len, page_size).budget for policy in selecting)),
            1 if all(policy.shared for policy in selecting) else num_kv_heads,
            any(policy.interval > 1 for policy in selecting),
            block,
            max((policy.page_counts(max_model_len, page_size).most_blocks for policy in selecting), default=0),
            any(policy.recall_every for policy in selecting),
        )

    def lacks(self, policy: SparsityConfig, num_prompt: int) -> str | None:
        """What this selector serves where `policy` asks for more; None if it serves it."""
        counts = policy.page_counts(num_prompt, self.page_size)
        if policy.kind not in self.selects:
            return f"the selects {', '.join(kind.name for kind in self.selects)}, not {policy.kind.name!r}"
        if self.heads == 1 and not policy.shared:
            return f"one list for all KV heads, not one for each as {policy.kind.name!r} without filter_layers needs"
        if policy.interval > 1 and not self.keeps:
            return f"selections of one step only, not interval={policy.interval}"
        if policy.block and policy.block != self.block:
            return f"blocks of {self.block} pages (0 is none), not block={policy.block}"
        covers = counts.budget >= self.longest  # a budget for the longest sequence needs neither blocks nor lists
        if policy.block and counts.most_blocks > self.blocks and not covers:
            return f"candidates in at most {self.blocks} blocks: declare as many candidates, or ask for fewer"
        if policy.recall_every and not self.samples:
            return f"selections whose recall nobody measures, not recall_every={policy.recall_every}"
        if counts.budget > self.width and not covers:
            return f"budgets of up to {self.width} pages of {self.page_size} tokens, not {counts.budget} pages"
        return None

    def initial_bounds(self, layout: DenseLayout | CodedLayout) -> Float[Array, "N K X"] | None:
        """Empty key bounds of one layer, if a declared select reads them there. Pages not sealed yet must be finite."""
        if layout.latent or not any(kind.bounds for kind in self.selects):
            return None
        return jnp.zeros((layout.num_pages, layout.num_kv_heads, 2 * layout.head_dim), layout.dtype)

    def initial_carried(self, num_rows: int, layout: DenseLayout | CodedLayout) -> Carried | None:
        """What one layer keeps of its rows between steps, if anything."""
        lists = Lists.empty(num_rows, self.heads, self.width) if self.keeps else None
        blocks = None
        if self.block:
            tile = layout.num_kv_heads, 2 * layout.head_dim
            blocks = Blocks.empty(num_rows, self.longest, self.block, tile, layout.dtype)
        return Carried(lists, blocks) if lists or blocks else None

    def seal(
        self,
        bounds: Float[Array, "N K X"] | None,
        pools: Pools,
        page_ids: Int[Array, " T"],
        offsets: Int[Array, " T"],
        decode_rows: int,
    ) -> Array | None:
        """Takes in the bounds of the pages whose last slot is among the T tokens that were just written."""
        if bounds is None:
            return None
        most = min(len(page_ids), len(page_ids) // self.page_size + decode_rows)
        full = lax.top_k(jnp.where(offsets == self.page_size - 1, page_ids, 0), most)[0]
        return self.seal_pages(bounds, pools, full)

    def seal_pages(
        self, bounds: Float[Array, "N K X"] | None, pools: Pools, page_ids: Int[Array, " S"]
    ) -> Array | None:
        """Takes in the bounds of full pages, which come first in the list; page 0 fills it. Most steps fill none."""
        if bounds is None:
            return None
        return pallas_kernels.page_bounds(bounds, pools[0], page_ids, count=(page_ids > 0).sum(dtype=jnp.int32))

    def read(
        self,
        layer: int,
        q: Float[Array, "B H D"],
        pages: DensePages | CodedPages,
        bounds: Float[Array, "N K X"] | None,
        batch: StepBatch,
        carried: Carried | None,
        handed: Handed | None,
        options: dict[str, Any],
    ) -> tuple[Float[Array, "B H D"], Carried | None, Handed]:
        """Attention of the decode rows in one layer, what it keeps, and what it hands on.

        Rows whose budget covers their pages read all of them and pay for nothing else. What a row reads depends on
        its own data only, so its result is the same in any batch.
        """
        policy, lengths = batch.policy, batch.decode.lengths
        page_ids, counts = batch.decode.page_list(self.page_size)
        listed = counts[:, 0]
        handed = handed or self._nothing_handed(policy)
        role, fits = policy.roles[:, layer], listed <= policy.budget
        owns = ((role == Role.SELECT) | (role == Role.SELECT_READ_ALL)) & ~fits
        due, lists = owns, handed.lists
        held, blocks = (None, None) if carried is None else (carried.lists, carried.blocks)
        if held is not None:
            mine = held.at(batch.rows)
            due &= ((lengths - 1) % policy.interval == 0) | (mine.counts.min(-1) == 0)
            lists = mine.grown(listed).where(owns, lists)
        limited = due & (policy.top_p < 1)
        reads_all = fits | (role == Role.READ_ALL) | (due & (role == Role.SELECT_READ_ALL))

        def attention(page_ids: Array, counts: Array, **more: Any) -> Any:
            return pages.attention(q, page_ids, counts, lengths, **more, **options)

        query = Query(
            q, pages.k_pages, pages.v_pages, bounds, page_ids, counts, lengths, options, scales=pages.scales
        )
        scans = [due & (policy.kind == place) for place, kind in enumerate(self.selects) if kind.reads_all]
        if self.samples:
            every = policy.recall_every
            scans.append(~reads_all & (every > 0) & ((lengths - 1) % jnp.maximum(every, 1) == 0))
        whole = attention(page_ids, _of(sum(scans, reads_all), counts), return_lse=bool(scans))
        if scans:
            whole, lse = whole
            query = query._replace(lse=lse)

        def anew(rows: Array, query: Query, lists: Lists) -> Lists:
            return choose(query, policy, rows, self.selects, self.heads, self.width).where(rows, lists)

        if blocks is not None:
            at, narrow = batch.rows, due & pays(policy, listed, blocks.size)
            due &= ~narrow

            def in_blocks(blocks: Blocks) -> tuple[Lists, Blocks]:
                count, _, recents = ends(policy, listed, blocks.size)
                made = blocks.completed(at, jnp.where(narrow, count - recents, 0), bounds, page_ids)
                few = candidates(query, policy, at, made, self.heads, self.blocks)
                return anew(narrow, few, lists), made

            lists, blocks = lax.cond(narrow.any(), in_blocks, lambda blocks: (lists, blocks), blocks)

        def some() -> tuple[Array, Lists, Array | None]:
            chosen = lax.cond(due.any(), lambda: anew(due, query, lists), lambda: lists)
            where = chosen.physical(page_ids), _of(~reads_all, chosen.counts)
            part = attention(*where, logical_ids=chosen.ids, return_lse=self.samples)
            captured = None
            if self.samples:
                part, part_lse = part
                captured = jnp.where(scans[-1], jnp.minimum(jnp.exp(part_lse - lse), 1).mean(-1), -1)
            return jnp.where(reads_all[:, None, None], whole, part), chosen, captured

        def none() -> tuple[Array, Lists, Array | None]:
            return whole, lists, jnp.full(len(listed), -1.0) if self.samples else None

        out, lists, captured = lax.cond((due | ~reads_all).any(), some, none)
        if held is not None:
            held = held.with_rows(batch.rows, lists.where(owns, mine))
        carried = None if carried is None else Carried(held, blocks)
        recall = handed.recall if captured is None else handed.recall.at[:, layer].set(captured)
        full = (lists.counts >= (policy.budget - policy.growth)[:, None]).sum(-1)
        capped = jnp.where(limited[:, None], jnp.stack([jnp.full_like(full, self.heads), full], -1), 0)
        handed = handed._replace(lists=lists, recall=recall, capped=handed.capped + capped)
        return out, carried, self._counted(handed, pages.k_pages.shape[1], listed, reads_all)

    def follow(
        self,
        layer: int,
        q: Float[Array, "B H D"],
        pages: LatentPages,
        batch: StepBatch,
        handed: Handed | None,
        options: dict[str, Any],
    ) -> tuple[Float[Array, "B H D"], Handed]:
        """Attention of the decode rows in a layer that never selects, and what it hands on: rows read all of their
        pages, or the list that they were handed."""
        policy, lengths = batch.policy, batch.decode.lengths
        page_ids, counts = batch.decode.page_list(self.page_size)
        listed, handed = counts[:, 0], handed or self._nothing_handed(policy)
        lists = handed.lists
        reads_all = (listed <= policy.budget) | (policy.roles[:, layer] == Role.READ_ALL)
        every = jnp.broadcast_to(jnp.arange(page_ids.shape[2], dtype=jnp.int32), page_ids.shape)
        wide = jnp.pad(lists.ids, ((0, 0), (0, 0), (0, page_ids.shape[2] - lists.ids.shape[2])))
        read = Lists(every, counts).where(reads_all, Lists(wide, lists.counts))
        where = read.physical(page_ids), read.counts
        out = pages.attention(q, *where, lengths, logical_ids=read.ids, **options)
        return out, self._counted(handed, pages.open_k.shape[1], listed, reads_all)

    def _nothing_handed(self, policy: PolicyRows) -> Handed:
        """What the first layer of a step gets."""
        rows, num_layers = policy.roles.shape
        return Handed.first(Lists.empty(rows, self.heads, self.width), num_layers)

    def _counted(self, handed: Handed, heads: int, listed: Int[Array, " B"], reads_all: Array) -> Handed:
        """With the tiles that a layer held, and read: all, or those of the lists."""
        read = jnp.where(reads_all, heads * listed, heads // self.heads * handed.lists.counts.sum(-1))
        return handed._replace(tiles=handed.tiles + jnp.stack([heads * listed, read], -1))


def _of(rows: Array, counts: Array) -> Array:
    """The counts [B, Kl] of some rows, 0 for the others."""
    return jnp.where(rows[:, None], counts, 0)
