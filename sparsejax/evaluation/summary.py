"""What follows from the measurements: what is learned, the worst cell, and how far compression goes without loss."""

from __future__ import annotations

from dataclasses import dataclass

from sparsejax.evaluation.results import CellResult, Evaluation, PolicyResult
from sparsejax.evaluation.statistics import paired_difference

LEARNED = 0.9  # accuracy of dense from which a cell says something about compression
TOLERANCE = 0.01  # accuracy that may be lost on the worst learned cell


@dataclass(frozen=True)
class Difference:
    """A policy against dense on the same documents of one cell."""

    cell: CellResult
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One policy over the learned cells.

    At the longest length, `compression` is dense bytes held over bytes held, `saving` the same of bytes that a decode
    step reads, key bounds included. Keeping less saves both, selecting saves reads only.
    """

    result: PolicyResult
    accuracy: float
    worst: CellResult | None
    differences: tuple[Difference, ...]
    compression: float
    saving: float

    @property
    def worst_difference(self) -> float:
        return min((one.value for one in self.differences), default=0.0)


def is_learned(dense: CellResult) -> bool:
    """Whether dense attention answers a cell well enough for a comparison."""
    return dense.accuracy >= LEARNED


def learned_cells(evaluation: Evaluation) -> list[CellResult]:
    """Dense results of the learned cells."""
    return [cell for cell in evaluation.dense.cells if is_learned(cell)]


def summarize(evaluation: Evaluation, result: PolicyResult) -> Summary:
    """A policy's mean and worst accuracy over the learned cells, with its differences from dense."""
    cells, differences = [], []
    for dense in learned_cells(evaluation):
        cell = result.find(dense.case, dense.length)
        if cell is not None:
            cells.append(cell)
            differences.append(Difference(cell, *paired_difference(cell.right, dense.right)))
    mean = sum(cell.accuracy for cell in cells) / len(cells) if cells else 0.0
    worst = min(cells, key=lambda cell: cell.accuracy, default=None)
    held, read = (_ratio(evaluation, result, kind) for kind in ("held", "step"))
    return Summary(result, mean, worst, tuple(differences), held, read)


def cliffs(evaluation: Evaluation) -> dict[str, Summary | None]:
    """By method: its policy that reads least and loses at most a point on the worst learned cell, or None."""
    found: dict[str, Summary | None] = {}
    for result in evaluation.results:
        best = found.setdefault(result.policy.method, None)
        summary = summarize(evaluation, result)
        kept = summary.differences and summary.worst_difference >= -TOLERANCE
        if kept and (best is None or summary.saving > best.saving):
            found[result.policy.method] = summary
    return found


def _ratio(evaluation: Evaluation, result: PolicyResult, bytes_of: str) -> float:
    ours = {kv.length: getattr(kv, bytes_of) for kv in result.kv}
    both = [(kv.length, getattr(kv, bytes_of) / ours[kv.length]) for kv in evaluation.dense.kv if ours.get(kv.length)]
    return max(both)[1] if both else 1.0
