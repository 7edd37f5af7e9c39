"""The finite table of step programs that an engine may ever run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsejax.engine.step import StepKey

MIN_ROWS = 4
"""Products with fewer rows take other, slower paths on CPU and differ bitwise."""
MAX_ROW_BUCKETS = 4
CHUNK_BUCKETS = (64, 256)


@dataclass(frozen=True)
class StepTable:
    """Buckets of decode rows and of prefill tokens, and which program serves a step.

    Attributes:
        row_buckets: decode rows, ascending; the last holds every sequence.
        chunk_buckets: prefill tokens beside a full decode section, ascending.
    """

    row_buckets: tuple[int, ...]
    chunk_buckets: tuple[int, ...]
    num_decode_steps: int

    @classmethod
    def build(cls, max_num_seqs: int, max_num_batched_tokens: int, num_decode_steps: int) -> StepTable:
        most = max(max_num_seqs, MIN_ROWS)
        rows = [most]
        while len(rows) < MAX_ROW_BUCKETS and rows[0] > MIN_ROWS:
            rows.insert(0, max(MIN_ROWS, rows[0] // (2 if most <= 32 else 4)))
        largest = max(max_num_batched_tokens - most, MIN_ROWS)
        chunks = [total - most for total in CHUNK_BUCKETS if 2 * most <= total < max_num_batched_tokens]
        return cls(tuple(rows), (*chunks, largest), num_decode_steps)

    @property
    def max_rows(self) -> int:
        return self.row_buckets[-1]

    @property
    def max_chunk(self) -> int:
        return self.chunk_buckets[-1]

    def decode(self, num_rows: int, num_steps: int, greedy: bool) -> StepKey:
        return StepKey(0, _bucket(num_rows, self.row_buckets), num_steps, greedy)

    def mixed(self, num_tokens: int, greedy: bool, prompt_logprobs: bool) -> StepKey:
        if prompt_logprobs:  # rare: one program serves every size
            return StepKey(self.max_chunk, self.max_rows, greedy=False, prompt_logprobs=True)
        return StepKey(_bucket(num_tokens, self.chunk_buckets), self.max_rows, greedy=greedy)

    def keys(self) -> Iterator[StepKey]:
        """Every step program, those that a first request needs first."""
        first = (self.mixed(1, True, False), self.decode(1, 1, True))
        yield from first
        for greedy in (True, False):
            for chunk in self.chunk_buckets:
                yield from (key for key in [self.mixed(chunk, greedy, False)] if key not in first)
            for rows in self.row_buckets:
                for steps in sorted({1, self.num_decode_steps}):
                    yield from (key for key in [self.decode(rows, steps, greedy)] if key not in first)
        yield self.mixed(1, False, True)


def _bucket(size: int, buckets: tuple[int, ...]) -> int:
    return next(bucket for bucket in buckets if size <= bucket)
