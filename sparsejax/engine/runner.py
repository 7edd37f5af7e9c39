"""The one owner of device arrays: turns plans into program calls and brings results back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation
from sparsejax.cache.codecs.compressor import Compressor
from sparsejax.cache.group import CacheGroup
from sparsejax.engine.compile import Programs, abstract
from sparsejax.engine.plan import Cut, StepPlan
from sparsejax.engine.rows import mask_words, neutral_row, stack_rows
from sparsejax.engine.sampler import SamplingRows
from sparsejax.engine.saved_row import SavedRow
from sparsejax.engine.state import DeviceState, Reads, initial_state, state_bytes
from sparsejax.engine.step import COMPRESSOR, StepKey, StepOutputs, StepShape
from sparsejax.engine.table import StepTable
from sparsejax.models.decoder import Decoder
from sparsejax.models.loader import LoadedModel
from sparsejax.models.streaming import STREAMED, streamed_layers
from sparsejax.sparsity.evictor import Evictor
from sparsejax.sparsity.selector import Selector

COPY_PAIRS = 16


@dataclass
class Results:
    """What one dispatched step computed, on the host.

    Attributes:
        sampled: int32 ``[steps, rows, W]`` in the order of ``plan.outputs``; columns as in `step`.
        prompt: int32 ``[chunk tokens, W]`` when prompt log-probabilities were asked for.
        reads: of ``plan.decode``, see `StepOutputs`.
    """

    sampled: np.ndarray
    prompt: np.ndarray | None
    reads: Reads | None = None


class Runner:
    """Holds weights, device state and programs. Steps run in the order they are dispatched."""

    def __init__(
        self,
        model: LoadedModel,
        groups: tuple[CacheGroup, ...],
        table: StepTable,
        table_width: int,
        implementation: Implementation,
        selector: Selector | None = None,
        evictor: Evictor | None = None,
        compressor: Compressor | None = None,
    ):
        self.params = model.params if compressor is None else model.params | {COMPRESSOR: compressor.layers}
        self.evictor = evictor
        self.table = table
        decoder = Decoder(model.config, model.dtype, streamed_layers(model.params, model.config.num_layers))
        self.spare_row = table.max_rows
        page_size, num_groups = groups[0].layout.page_size, len(groups)
        self.max_entries = num_groups * (2 * table.max_rows + table.max_chunk // page_size + 1)
        self.shape = StepShape(decoder, page_size, self.spare_row, self.max_entries, num_groups)
        self.vocab_size = model.config.vocab_size
        num_rows = table.max_rows + 1
        self.state: DeviceState = initial_state(
            model.config,
            groups,
            num_rows=table.max_rows,
            table_width=table_width,
            sampling=_neutral_rows(self.vocab_size, num_rows),
            implementation=implementation,
            selector=selector,
            evictor=evictor,
        )
        row = jax.ShapeDtypeStruct((), jnp.int32)
        self._row_shapes = jax.eval_shape(lambda kv, row: kv.row_arrays(row), self.state.kv, row)
        self._table_mirror = np.zeros((num_rows, num_groups, table_width), np.int32)
        self.programs = Programs()

    def memory(self) -> dict[str, int]:
        """Bytes of the arrays that exist, by component."""
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        codec = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params.get(COMPRESSOR)))
        extra = {COMPRESSOR: codec} if codec else {}
        if self.streamed_bytes:
            extra["host_weights"] = self.streamed_bytes
        return {"weights": total - codec - self.streamed_bytes, **extra, **state_bytes(self.state)}

    @property
    def streamed_bytes(self) -> int:
        """Of the weights in main memory: each pass through the model copies all of them to the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params.get(STREAMED)))

    def warm(self, keys: list[StepKey], progress: Any = list) -> None:
        """Compiles the step programs `keys` and the small programs beside them."""
        self.programs.get_all({key: partial(self._build, key) for key in [*keys, *self._small_programs()]}, progress)
        self.programs.num_warm = self.programs.num_compiles

    def admit(
        self,
        row: int,
        values: dict[str, np.ndarray],
        policy: dict[str, np.ndarray] | None,
        keep: dict[str, np.ndarray] | None,
    ) -> None:
        """Sets the sampling state and the policies of `row` for the sequence that takes it."""
        self.state = self._program("admit")(self.state, np.int32(row), values, policy, keep)

    @property
    def rows_hold(self) -> bool:
        """Whether rows that evict hold something besides their pages."""
        return self.evictor is not None and bool(jax.tree.leaves(self._row_shapes))

    def save_row(self, row: int) -> SavedRow:
        """What `row` holds besides its pages."""
        self.state, arrays = self._program("save_row")(self.state, np.int32(row))
        return SavedRow(arrays)

    def load_row(self, row: int, saved: SavedRow) -> None:
        """Gives `row` what `save_row` read, once it is admitted."""
        self.state = self._program("load_row")(self.state, np.int32(row), saved.arrays)

    def set_bias(self, row: int, ids: np.ndarray, values: np.ndarray) -> None:
        """Replaces the logit biases of `row` (bans that depend on what was generated)."""
        self.state = self._program("bias")(self.state, np.int32(row), ids, values)

    def set_allowed(self, masks: dict[int, np.ndarray]) -> None:
        """Replaces the allowed tokens of rows: int32 bitmasks ``[ceil(V / 32)]`` by row, all in one upload."""
        rows = np.full(self.table.max_rows, self.spare_row, np.int32)
        words = np.full((self.table.max_rows, mask_words(self.vocab_size)), -1, np.int32)
        for slot, (row, mask) in enumerate(masks.items()):
            rows[slot], words[slot] = row, mask
        self.state = self._program("allowed")(self.state, rows, words)

    def dispatch(
        self, plan: StepPlan, greedy: bool, prompt_logprobs: bool
    ) -> StepOutputs:
        """Starts one step and returns its results as device arrays, still being computed."""
        self._evict(plan.evictions)
        self._copy_pages(plan.copies)
        if plan.chunks:
            key = self.table.mixed(sum(chunk.count for chunk in plan.chunks), greedy, prompt_logprobs)
        else:
            key = self.table.decode(len(plan.decode), plan.num_steps, greedy)
        packed, fields = self.shape.packing(key).empty()
        self._fill_entries(plan, fields)
        self._fill_decode(plan, fields)
        if plan.chunks:
            self._fill_chunks(plan, fields)
        self.state, outputs = self._program(key)(self.state, self.params, packed)
        for array in jax.tree.leaves(outputs):
            array.copy_to_host_async()
        return outputs

    def read(self, outputs: StepOutputs) -> Results:
        """Waits for the results of a dispatched step."""
        sampled, reads, prompt = jax.tree.map(np.asarray, outputs)
        return Results(sampled, prompt, reads)

    def decode_tiles(self, plan: StepPlan, evicted: bool = False) -> int:
        """Tiles (a page of one KV head of one layer) that the decode rows of a step hold, once it is planned; with
        `evicted` as many as they would hold if nothing had left."""
        size, tiles = self.shape.page_size, 0
        for index, group in enumerate(self.state.kv.groups):
            lengths = (s.num_computed if evicted else s.lengths[index] for s in plan.decode)
            pages = sum(-(-(length - step) // size) for length in lengths for step in range(plan.num_steps))
            tiles += pages * group.page_tiles
        return tiles

    def _fill_entries(self, plan: StepPlan, fields: dict[str, np.ndarray]) -> None:
        fields["entry_rows"][:] = self.spare_row
        self._mirror_entries(plan)
        if len(plan.entries) > self.max_entries:
            # A long prompt was admitted at once: sending every table is one transfer and no other program.
            self._send_tables()
            return
        width = self._table_mirror.shape[2]
        for slot, ((row, group, index), page) in enumerate(plan.entries.items()):
            fields["entry_rows"][slot], fields["entry_indices"][slot], fields["entry_pages"][slot] = (
                row,
                group * width + index,
                page,
            )

    def _mirror_entries(self, plan: StepPlan) -> None:
        for at, page in plan.entries.items():
            self._table_mirror[at] = page

    def _send_tables(self) -> None:
        # A copy: the transfer may read it after this returns, when the mirror already has the next plan's entries.
        tables = self._table_mirror.reshape(len(self._table_mirror), -1).copy()
        self.state = self.state.with_tables(jnp.asarray(tables))

    def _fill_decode(self, plan: StepPlan, fields: dict[str, np.ndarray]) -> None:
        fields["rows"][:] = self.spare_row
        for slot, sequence in enumerate(plan.decode):
            at = sequence.num_computed - plan.num_steps
            fields["rows"][slot] = sequence.row
            fields["tokens"][slot] = sequence.tokens[at]
            fields["positions"][slot] = at
            fields["shifts"][:, slot] = sequence.shifts
        for slot, (sequence, at) in enumerate(plan.outputs):
            fields["steps"][slot] = at - sequence.num_prompt

    def _fill_chunks(self, plan: StepPlan, fields: dict[str, np.ndarray]) -> None:
        fields["sample_rows"][:] = self.spare_row
        fields["chunk_rows"][:] = self.spare_row
        count = len(plan.decode)
        fields["sample_rows"][:count] = fields["rows"][:count]
        fields["sample_index"][:count] = np.arange(count)
        start, starts = 0, fields["query_starts"]
        for slot, chunk in enumerate(plan.chunks):
            stop = start + chunk.count
            tokens = chunk.sequence.tokens
            fields["chunk_tokens"][start:stop] = tokens[chunk.start : chunk.start + chunk.count]
            fields["chunk_rows"][slot] = chunk.sequence.row
            fields["chunk_starts"][slot] = chunk.start
            fields["chunk_shifts"][:, slot] = chunk.sequence.shifts
            starts[slot + 1 :] = stop
            if chunk.samples:
                fields["sample_rows"][count] = chunk.sequence.row
                fields["sample_index"][count] = self.table.max_rows + stop - 1
                count += 1
            if "next_tokens" in fields:
                known = tokens[chunk.start + 1 : chunk.start + 1 + chunk.count]
                fields["next_tokens"][start : start + len(known)] = np.maximum(known, 0)
            start = stop

    def cut_caches(self, plan: StepPlan) -> None:
        """Carries out the evictions of a plan that computes nothing."""
        self._evict(plan.evictions)
        self._mirror_entries(plan)
        self._send_tables()

    def _evict(self, cuts: list[Cut]) -> None:
        for cut in cuts:
            new_pages = np.zeros((self.shape.num_groups, self.evictor.capacity), np.int32)
            for group, pages in enumerate(cut.new_pages):
                new_pages[group, : len(pages)] = pages
            numbers = map(np.int32, (cut.row, cut.lengths, cut.kept, cut.at))
            self.state = self._program("cut")(self.state, *numbers, new_pages)

    def _copy_pages(self, copies: list[tuple[int, int, int]]) -> None:
        for start in range(0, len(copies), COPY_PAIRS):
            pairs = np.zeros((2, self.shape.num_groups, COPY_PAIRS), np.int32)
            for place, (group, *pair) in enumerate(copies[start : start + COPY_PAIRS]):
                pairs[:, group, place] = pair
            self.state = self._program("copy")(self.state, *pairs)

    def _program(self, key: StepKey | str) -> jax.stages.Compiled:
        return self.programs.get(key, partial(self._build, key))

    def _build(self, key: StepKey | str) -> tuple[Callable, tuple]:
        """The function of a program, and shapes of its arguments: of a step, or of a small program by name."""
        state = abstract(self.state)
        if isinstance(key, StepKey):
            packed = jax.ShapeDtypeStruct((self.shape.packing(key).size,), jnp.int32)
            return self.shape.program(key), (state, abstract(self.params), packed)
        function, *arguments = self._small_programs()[key]
        return function, (state, *arguments)

    def _small_programs(self) -> dict[str, tuple]:
        """Functions that change the state between steps, and their arguments after it."""
        sampling = self.state.sampling
        rows, groups = self.table.max_rows, self.shape.num_groups

        def cut(state: DeviceState, *args: Any) -> DeviceState:
            return state.cut(self.evictor, *args)

        def ids(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        def row_of(array: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)

        def fields_of(part: Any) -> dict[str, jax.ShapeDtypeStruct] | None:
            return None if part is None else {name: row_of(array) for name, array in vars(part).items()}

        programs = {
            "admit": (DeviceState.admit, ids(), *map(fields_of, (sampling, self.state.policy, self.state.keep))),
            "copy": (DeviceState.copy_pages, ids(groups, COPY_PAIRS), ids(groups, COPY_PAIRS)),
            "bias": (DeviceState.set_bias, ids(), row_of(sampling.bias_ids), row_of(sampling.bias_values)),
            "allowed": (DeviceState.set_allowed, ids(rows), ids(rows, mask_words(self.vocab_size))),
        }
        if self.evictor is not None:
            programs["cut"] = (cut, ids(), ids(groups), ids(groups), ids(), ids(groups, self.evictor.capacity))
        if self.rows_hold:
            programs["save_row"] = (DeviceState.save_row, ids())
            programs["load_row"] = (DeviceState.load_row, ids(), self._row_shapes)
        return programs

def _neutral_rows(vocab_size: int, num_rows: int) -> SamplingRows:
    rows = stack_rows([neutral_row(vocab_size)] * num_rows)
    return SamplingRows(**{name: jnp.asarray(values) for name, values in rows.items()})
