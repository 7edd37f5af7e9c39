"""What the scheduler tells the runner to do: one device call. Imports no JAX."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsejax.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of `sequence` from position `start` on; `samples` if the last one is its newest token."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True)
class Cut:
    """The cache of the sequence in `row` is cut: in each cache group `kept` of its `lengths` tokens move to
    `new_pages`.

    `at` of its tokens are computed, evicted ones included.
    """

    row: int
    lengths: list[int]
    kept: tuple[int, ...]
    at: int
    new_pages: list[list[int]]


@dataclass
class StepPlan:
    """What one device call computes.

    Attributes:
        decode: sequences that compute one token each (per decode step).
        chunks: prefill work, empty for a pure decode step.
        num_steps: decode steps of the call; above 1 only when `chunks` is empty.
        admitted: sequences that took a row for this step and whose row state must be set first.
        evictions: caches to cut before the copies and the step.
        copies: pages ``(group, source, target)`` to copy before the step.
        entries: new page-table entries, ``(row, group, logical index) -> page``.
        outputs: ``(sequence, index into its tokens)`` of the first token each sampling row produces, decode
            rows first, then chunks that sample.
    """

    decode: list[Sequence] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    num_steps: int = 1
    admitted: list[Sequence] = field(default_factory=list)
    evictions: list[Cut] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    entries: dict[tuple[int, int, int], int] = field(default_factory=dict)
    outputs: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decode) * self.num_steps + sum(chunk.count for chunk in self.chunks)

    def enter(self, sequence: Sequence) -> None:
        """Makes entries of all pages of a sequence."""
        for group, pages in enumerate(sequence.tables):
            self.entries.update({(sequence.row, group, index): page for index, page in enumerate(pages)})
