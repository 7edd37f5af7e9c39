"""A picture of accuracy against realised KV bytes; needs matplotlib (the ``plot`` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.evaluation.results import Evaluation
from sparsejax.evaluation.summary import Summary, summarize


def load_pyplot() -> Any:
    """matplotlib's pyplot on a backend that needs no display.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install 'sparsejax[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(evaluation: Evaluation, path: str | Path) -> None:
    """Writes a picture: one line per preset over its budgets, mean accuracy solid, worst learned cell dashed."""
    pyplot = load_pyplot()
    lines: dict[str, list[Summary]] = {}
    for result in evaluation.results:
        summary = summarize(evaluation, result)
        if summary.worst is not None and result.kv:
            lines.setdefault(result.policy.preset, []).append(summary)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for index, (preset, found) in enumerate(lines.items()):
        found.sort(key=_bytes)
        across, color = [_bytes(one) for one in found], f"C{index % 10}"
        axes.plot(across, [100 * one.accuracy for one in found], "o-", color=color, label=preset)
        axes.plot(across, [100 * one.worst.accuracy for one in found], "x--", color=color)
    longest = max(evaluation.suite.lengths)
    axes.set_xlabel(f"KV bytes per token at {longest} tokens, as the engine reports them")
    axes.set_ylabel("exact answers, % (dashed: worst learned cell)")
    axes.set_ylim(-3, 103)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bytes(summary: Summary) -> float:
    return summary.result.kv[-1].per_token
