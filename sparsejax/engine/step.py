"""The device side of a step: one pure function from the packed upload to sampled tokens.

`decode` computes one token for each of B rows, k times; `mixed` computes one token for every decode row and
the prefill chunks. Both end in the sampler, so logits never leave the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sparsejax.cache.paged import Rows, StepBatch
from sparsejax.engine.packing import Packing
from sparsejax.engine.params import MAX_LOGPROBS
from sparsejax.engine.sampler import Sampled, sample, sample_greedy, score
from sparsejax.engine.state import DeviceState, Reads
from sparsejax.models.decoder import Decoder

COMPRESSOR = "compressor"
"""Under this name `params` hold, beside those of the model, the weights of a codec by layer."""
READOUT_BLOCK = 64
"""Prompt tokens whose logits exist at once when prompt log-probabilities are asked for."""


@dataclass(frozen=True, order=True)
class StepKey:
    """Names one compiled program.

    Attributes:
        chunk: prefill tokens of a mixed step; 0 is a pure decode step.
        rows: rows of the decode section.
        num_steps: decode steps in the call.
        greedy: every row takes the arg max and asks for nothing more; the full sampler is left out.
        prompt_logprobs: also read out the log-probability of every next prompt token.
    """

    chunk: int
    rows: int
    num_steps: int = 1
    greedy: bool = True
    prompt_logprobs: bool = False


class StepOutputs(NamedTuple):
    """What a step program computes besides the state.

    Attributes:
        sampled: int32 ``[steps, rows, W]``: token, log-probability bits, and what the full sampler adds.
        reads: what the decode rows read, ``[steps, ...]``; None where every row reads all.
        prompt: int32 ``[chunk tokens, W]`` when prompt log-probabilities are asked for.
    """

    sampled: Array
    reads: Reads | None
    prompt: Array | None = None


@dataclass(frozen=True)
class StepShape:
    """Static facts every step program shares.

    Attributes:
        spare_row: the row of the device state that padding reads and writes (= max_num_seqs).
        max_entries: page-table entries one upload can carry.
        num_groups: cache groups, each with page tables and shifts of its own.
    """

    decoder: Decoder
    page_size: int
    spare_row: int
    max_entries: int
    num_groups: int = 1

    def packing(self, key: StepKey) -> Packing:
        """Fields of the upload of program `key`. Unused rows name the spare row."""
        rows, entries = (key.rows,), (self.max_entries,)
        fields = [
            ("entry_rows", entries),
            ("entry_indices", entries),
            ("entry_pages", entries),
            ("rows", rows),
            ("tokens", rows),
            ("positions", rows),
            ("shifts", (self.num_groups, key.rows)),
            ("steps", rows),
        ]
        if key.chunk:
            chunk = (key.chunk,)
            fields += [
                ("chunk_tokens", chunk),
                ("chunk_rows", rows),
                ("chunk_starts", rows),
                ("chunk_shifts", (self.num_groups, key.rows)),
                ("query_starts", (key.rows + 1,)),
                ("sample_rows", rows),
                ("sample_index", rows),
            ]
            if key.prompt_logprobs:
                fields.append(("next_tokens", chunk))
        return Packing(tuple(fields))

    def program(self, key: StepKey):
        """The function ``(state, params, packed) -> (state, outputs)`` of program `key`."""

        def step(state: DeviceState, params: Any, packed: Int[Array, " Z"]):
            fields = self.packing(key).views(packed)
            state = state.with_entries(fields["entry_rows"], fields["entry_indices"], fields["entry_pages"])
            return (self._mixed if key.chunk else self._decode)(key, state, params, fields)

        return step

    def _decode(self, key: StepKey, state: DeviceState, params: Any, fields: dict[str, Array]):
        rows = fields["rows"]
        stop_ids = state.sampling.stop_ids[rows]

        def body(carry, i):
            state, tokens, live = carry
            positions = jnp.where(live, fields["positions"] + i, 0)
            steps = fields["steps"] + i
            batch = self._decode_batch(state, params, rows, tokens, positions, fields["shifts"], live)
            hidden, kv = self.decoder.apply({"params": params}, batch, state.kv)
            kv, handed = kv.end_step()
            state, reads = replace(state, kv=kv).after_step(rows, handed)
            state, sampled = self._sample(key, state, params, hidden, rows, steps)
            stopped = jnp.any(sampled.token[:, None] == stop_ids, axis=1)
            return (state, sampled.token, live & ~stopped), (_outputs(key, sampled), reads)

        carry = (state, self._inputs(state, fields), rows != self.spare_row)
        if key.num_steps == 1:
            (state, _, _), outputs = body(carry, 0)
            return state, StepOutputs(*jax.tree.map(lambda output: output[None], outputs))
        (state, _, _), outputs = lax.scan(body, carry, jnp.arange(key.num_steps, dtype=jnp.int32))
        return state, StepOutputs(*outputs)

    def _mixed(self, key: StepKey, state: DeviceState, params: Any, fields: dict[str, Array]):
        rows, starts = fields["rows"], fields["query_starts"]
        inputs, live = self._inputs(state, fields), rows != self.spare_row
        decode = self._decode_batch(state, params, rows, inputs, fields["positions"], fields["shifts"], live)
        index = jnp.arange(key.chunk, dtype=jnp.int32)
        owner = jnp.searchsorted(starts, index, side="right").astype(jnp.int32) - 1
        owner = jnp.minimum(owner, key.rows - 1)
        live = index < starts[-1]
        positions = jnp.where(live, fields["chunk_starts"][owner] + index - starts[owner], 0)
        all_tables, counts = state.tables_of(fields["chunk_rows"]), starts[1:] - starts[:-1]
        observe = decode.observe
        if observe is not None:
            chunk_rows = fields["chunk_rows"]
            chunks = state.keep.observe(chunk_rows, chunk_rows[owner], positions, live, state.num_observed)
            observe = observe.with_chunks(chunks)
        batches = []
        for group in range(self.num_groups):
            tables, shifts, its = all_tables[:, group], fields["chunk_shifts"][group], decode.of_group(group)
            pages, offsets = self._slots(tables[owner], positions - shifts[owner], live)
            lengths = jnp.where(counts > 0, fields["chunk_starts"] - shifts + counts, 0)
            batches.append(
                StepBatch(
                    tokens=jnp.concatenate([its.tokens, fields["chunk_tokens"]]),
                    positions=jnp.concatenate([its.positions, positions]),
                    page_ids=jnp.concatenate([its.page_ids, pages]),
                    offsets=jnp.concatenate([its.offsets, offsets]),
                    decode=its.decode,
                    prefill=Rows(tables, lengths, starts),
                    rows=rows,
                    chunk_rows=fields["chunk_rows"],
                    policy=its.policy,
                    observe=observe,
                    compressor=its.compressor,
                )
            )
        batch = replace(batches[0], deeper=tuple(batches[1:]))
        batch = state.kv.planned(batch)
        hidden, kv = self.decoder.apply({"params": params}, batch, state.kv)
        kv, handed = kv.end_step()
        state, reads = replace(state, kv=kv).after_step(rows, handed)
        state, sampled = self._sample(
            key,
            state,
            params,
            hidden[fields["sample_index"]],
            fields["sample_rows"],
            fields["steps"],
        )
        prompt = None
        if key.prompt_logprobs:
            prompt = self._prompt_logprobs(params, hidden[key.rows :], fields["next_tokens"])
        outputs = jax.tree.map(lambda output: output[None], (_outputs(key, sampled), reads))
        return state, StepOutputs(*outputs, prompt)

    def _inputs(self, state: DeviceState, fields: dict[str, Array]) -> Int[Array, " B"]:
        """The host's token where it knows it, the row's newest one on the device where it does not."""
        return jnp.where(fields["tokens"] >= 0, fields["tokens"], state.last_tokens[fields["rows"]])

    def _decode_batch(
        self, state: DeviceState, params: Any, rows, tokens, positions, shifts, live
    ) -> StepBatch:
        all_tables, batches = state.tables_of(rows), []
        policy = None if state.policy is None else state.policy.at(rows)
        observe = None if state.keep is None else state.keep.observe(rows, rows, positions, live, state.num_observed)
        for group in range(self.num_groups):
            slots = positions - shifts[group]
            pages, offsets = self._slots(all_tables[:, group], slots, live)
            held = Rows(all_tables[:, group], jnp.where(live, slots + 1, 0))
            facts = dict(rows=rows, policy=policy, observe=observe, compressor=params.get(COMPRESSOR))
            batches.append(StepBatch(tokens, positions, pages, offsets, held, **facts))
        return replace(batches[0], deeper=tuple(batches[1:]))

    def _slots(self, tables: Int[Array, "T S"], slots: Int[Array, " T"], live) -> tuple[Array, Array]:
        """Page and offset of the slot of each token; padding goes to the dump page."""
        slots = jnp.where(live, slots, 0)
        pages = jnp.take_along_axis(tables, (slots // self.page_size)[:, None], axis=1)[:, 0]
        return jnp.where(live, pages, 0), slots % self.page_size

    def _sample(
        self, key: StepKey, state: DeviceState, params: Any, hidden: Float[Array, "B E"], rows, steps
    ) -> tuple[DeviceState, Sampled]:
        logits = self._logits(params, hidden)
        if key.greedy:
            sampled = sample_greedy(logits)
        else:
            gathered = jax.tree.map(lambda values: values[rows], state.sampling)
            sampled = sample(logits, replace(gathered, step=steps))
            counts = state.sampling.output_counts.at[rows, sampled.token].add(1)
            state = replace(state, sampling=replace(state.sampling, output_counts=counts))
        return replace(state, last_tokens=state.last_tokens.at[rows].set(sampled.token)), sampled

    def _logits(self, params: Any, hidden: Float[Array, "B E"]) -> Float[Array, "B V"]:
        return self.decoder.apply({"params": params}, hidden, method="logits")

    def _prompt_logprobs(
        self, params: Any, hidden: Float[Array, "T E"], targets: Int[Array, " T"]
    ) -> Int[Array, "T W"]:
        """Log-probabilities of `targets` and of the best tokens, a block of logits at a time."""
        size = min(READOUT_BLOCK, hidden.shape[0])
        pad = -hidden.shape[0] % size
        blocks = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[1])
        wanted = jnp.pad(targets, (0, pad)).reshape(-1, size)
        every = jnp.full(size, MAX_LOGPROBS, jnp.int32)
        packed = lax.map(
            lambda block: _pack_full(score(self._logits(params, block[0]), block[1], every)), (blocks, wanted)
        )
        return packed.reshape(-1, packed.shape[-1])[: hidden.shape[0]]


def _outputs(key: StepKey, sampled: Sampled) -> Int[Array, "B W"]:
    """Token and log-probability of each row; the full sampler adds rank and the best alternatives."""
    if key.greedy:
        return _join(sampled.token, _bits(sampled.logprob))
    return _pack_full(sampled)


def _pack_full(sampled: Sampled) -> Int[Array, "B W"]:
    return _join(
        sampled.token, _bits(sampled.logprob), sampled.rank, sampled.top_ids, _bits(sampled.top_logprobs)
    )


def _join(*columns: Int[Array, " ..."]) -> Int[Array, "B W"]:
    """Stacks results side by side: one array comes back to the host."""
    return jnp.concatenate([c if c.ndim > 1 else c[:, None] for c in columns], axis=-1)


def _bits(values: Float[Array, " ..."]) -> Int[Array, " ..."]:
    return lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
