"""What lives on the device between steps, donated to every step and returned by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Implementation
from sparsejax.cache.coded import CodedKV
from sparsejax.cache.group import CacheGroup
from sparsejax.cache.latent import LatentKV
from sparsejax.cache.layout import CodedLayout
from sparsejax.cache.paged import PagedKV
from sparsejax.engine.sampler import SamplingRows
from sparsejax.models.config import DecoderConfig
from sparsejax.sparsity.evictor import Evictor
from sparsejax.sparsity.keep_rows import KeepRows
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.selector import Handed, Selector


class Reads(NamedTuple):
    """What the decode rows of a step read.

    Attributes:
        tiles: int32 ``[B, 2]``: tiles (a page of one KV head of one layer) that each row holds, and that it read.
        capped: int32 ``[B, 2]``: lists that a `top_p` made, and those of them that fill the budget.
        recall: float32 ``[B, L]``: the share of attention probability that it captured, -1 where that was not
            measured; None where no policy measures it.
        more: int32 ``[B, 2]``: 1 for rows whose budget grew for that, and for those that read everything from now.
    """

    tiles: Array
    capped: Array
    recall: Array | None = None
    more: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """Pools, page tables and per-row state of ``max_num_seqs`` rows and one spare row for padding.

    Attributes:
        tables: physical page ids by row and logical index, the tables of the cache groups side by side.
        last_tokens: the newest token of each row, the next decode step's input.
        sampling: sampling parameters and output counts of each row; its ``step`` is filled in by the step.
        policy: what each row reads of its pages; None where every row reads all.
        keep: what each row evicts and observes for it; None where no row evicts.
    """

    kv: PagedKV
    tables: Int[Array, "B S"]
    last_tokens: Int[Array, " B"]
    sampling: SamplingRows
    policy: PolicyRows | None
    keep: KeepRows | None

    @property
    def num_observed(self) -> int:
        """Queries that are stored per row for evictions to come."""
        queries = self.kv.observed[0].queries
        return 0 if queries is None else queries.shape[1]

    def with_entries(
        self, rows: Int[Array, " U"], indices: Int[Array, " U"], pages: Int[Array, " U"]
    ) -> DeviceState:
        """Writes page-table entries; padding goes to the spare row."""
        return replace(self, tables=self.tables.at[rows, indices].set(pages))

    def admit(
        self,
        row: Int[Array, ""],
        values: dict[str, Array],
        policy: dict[str, Array] | None,
        keep: dict[str, Array] | None,
    ) -> DeviceState:
        """Sets the sampling state and the policies of one row: fields without the row axis."""
        rows = {name: getattr(self.sampling, name).at[row].set(value) for name, value in values.items()}
        return replace(
            self,
            kv=self.kv.without_row(row),
            sampling=replace(self.sampling, **rows),
            policy=None if self.policy is None else self.policy.with_row(row, policy),
            keep=None if self.keep is None else self.keep.with_row(row, keep),
        )

    def cut(
        self, evictor: Evictor, row: Array, length: Array, kept: Array, at: Array, new_pages: Int[Array, "Gr C"]
    ) -> DeviceState:
        """Cuts the cache of one row, whose tables still list its old pages; see `Evictor.evict`."""
        kv = evictor.evict(self.kv, self.keep, row, self.tables_of(row), length, kept, at, new_pages)
        return replace(self, kv=kv.without_row(row))

    def save_row(self, row: Int[Array, ""]) -> tuple[DeviceState, Any]:
        """What `row` holds besides its pages."""
        return self, self.kv.row_arrays(row)

    def load_row(self, row: Int[Array, ""], arrays: Any) -> DeviceState:
        """Gives `row` what `save_row` read of another."""
        return replace(self, kv=self.kv.with_row_arrays(row, arrays))

    def after_step(self, rows: Int[Array, " R"], handed: Handed | None) -> tuple[DeviceState, Reads | None]:
        """What decode rows read in a step, and the state in which those that captured too little read more."""
        if handed is None:
            return self, None
        selector = self.kv.selector
        if not selector.samples:
            return self, Reads(handed.tiles, handed.capped)
        policy, more = self.policy.guarded(rows, handed.recall, selector.width)
        return replace(self, policy=policy), Reads(handed.tiles, handed.capped, handed.recall, more)

    def tables_of(self, rows: Int[Array, "*B"]) -> Int[Array, "*B Gr S"]:
        """Page tables of rows in each cache group."""
        tables = self.tables[rows]
        return tables.reshape(*rows.shape, len(self.kv.groups), -1)

    def with_tables(self, tables: Int[Array, "B S"]) -> DeviceState:
        return replace(self, tables=tables)

    def set_bias(self, row: Int[Array, ""], ids: Int[Array, " A"], values: Float[Array, " A"]) -> DeviceState:
        """Replaces the logit biases of one row."""
        sampling = self.sampling
        return replace(
            self,
            sampling=replace(
                sampling,
                bias_ids=sampling.bias_ids.at[row].set(ids),
                bias_values=sampling.bias_values.at[row].set(values),
            ),
        )

    def set_allowed(self, rows: Int[Array, " B"], masks: Int[Array, "B W"]) -> DeviceState:
        """Replaces the allowed tokens of rows; padding goes to the spare row."""
        sampling = self.sampling
        return replace(self, sampling=replace(sampling, allowed=sampling.allowed.at[rows].set(masks)))

    def copy_pages(self, source: Int[Array, "Gr C"], target: Int[Array, "Gr C"]) -> DeviceState:
        return replace(self, kv=self.kv.copy_pages(source, target))


def initial_state(
    config: DecoderConfig,
    groups: tuple[CacheGroup, ...],
    *,
    num_rows: int,
    table_width: int,
    sampling: SamplingRows,
    implementation: Implementation,
    selector: Selector | None = None,
    evictor: Evictor | None = None,
) -> DeviceState:
    """Zeroed pools and tables for `num_rows` rows plus the spare one; `sampling` has that many rows already.

    `groups` hold the layers in order; each row has a table of `table_width` pages in each of them.
    """
    layouts = [layout for group in groups for layout in group.layouts]
    pools = tuple(layout.zeros() for layout in layouts)
    bounds = tuple(None if selector is None else selector.initial_bounds(layout) for layout in layouts)
    observed = tuple(None if evictor is None else evictor.nothing_seen(num_rows + 1, layout) for layout in layouts)
    carried = tuple(
        None if selector is None or layout.latent else selector.initial_carried(num_rows + 1, layout)
        for layout in layouts
    )
    coded = CodedKV if isinstance(layouts[0], CodedLayout) else PagedKV
    kind = LatentKV if any(layout.latent for layout in layouts) else coded
    kv = kind(
        pools, bounds, carried, observed, groups[0], config.windows, config.attn_soft_cap, implementation, selector,
        deeper=groups[1:],
    )  # fmt: skip
    return DeviceState(
        kv,
        tables=jnp.zeros((num_rows + 1, len(groups) * table_width), jnp.int32),
        last_tokens=jnp.zeros(num_rows + 1, jnp.int32),
        sampling=sampling,
        policy=None if selector is None else PolicyRows.neutral(num_rows + 1, config.num_layers),
        keep=None if evictor is None else KeepRows.neutral(num_rows + 1),
    )


def state_bytes(state: DeviceState) -> dict[str, int]:
    """Allocated bytes by component."""

    def total(tree) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    lists = [carried and carried.lists for carried in state.kv.carried]
    return {
        **{name: total(arrays) for name, arrays in state.kv.parts().items()},
        "page_tables": total(state.tables),
        "sampling_rows": total((state.last_tokens, state.sampling, state.policy, state.keep, lists)),
    }
