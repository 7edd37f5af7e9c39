"""What an evaluation found, before anything is derived from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsejax.evaluation.policies import Policy
from sparsejax.evaluation.suite import Suite


@dataclass(frozen=True)
class CellResult:
    """Which documents of a cell one policy got right, and its replies.

    `recall` is the mean share of expected items named, `tokens` counts what was computed of prompts and replies,
    `seconds` leaves out compilation.
    """

    case: str
    length: int
    right: tuple[bool, ...]
    recall: float
    tokens: int
    seconds: float
    replies: tuple[str, ...] = field(repr=False)
    expected: tuple[str, ...] = field(repr=False)

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class KvBytes:
    """KV bytes that the engine reports for one sequence of `length` prompt tokens served alone.

    `held` and `read` by an average decode step, which takes `seconds`; `peak` the most that was held at any time;
    `bounds` what such a step reads of key bounds to select by them, which `read` leaves out.
    """

    length: int
    held: float
    peak: int
    read: float
    seconds: float
    bounds: float = 0.0

    @property
    def per_token(self) -> float:
        return self.held / self.length

    @property
    def step(self) -> float:
        """All that a decode step reads."""
        return self.read + self.bounds


@dataclass(frozen=True)
class PolicyResult:
    """All cells that a policy served; `compressor` is the fingerprint of that of its engine, if there was one."""

    policy: Policy
    cells: tuple[CellResult, ...]
    kv: tuple[KvBytes, ...]
    compressor: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return sum(cell.tokens for cell in self.cells) / max(1e-9, sum(cell.seconds for cell in self.cells))

    def find(self, case: str, length: int) -> CellResult | None:
        return next((cell for cell in self.cells if (cell.case, cell.length) == (case, length)), None)


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured; `results` begins with dense, `skipped` says which cells could not be made."""

    model: str
    suite: Suite
    results: tuple[PolicyResult, ...]
    skipped: tuple[tuple[str, int, str], ...]
    seconds: float

    @property
    def dense(self) -> PolicyResult:
        return self.results[0]
