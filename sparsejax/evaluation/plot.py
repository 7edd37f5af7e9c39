"""A picture of accuracy against KV bytes; needs matplotlib (the ``plot`` extra)."""

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


KINDS = {"held": "held by decode steps", "step": "read by a decode step"}
MEGABYTE = 1e6


def draw(evaluation: Evaluation, path: str | Path) -> None:
    """Writes a picture of accuracy against bytes held and bytes read: one line per preset over its budgets.

    The mean of the learned cells is solid, the worst of them dashed.
    """
    pyplot = load_pyplot()
    lines: dict[str, list[Summary]] = {}
    for result in evaluation.results:
        summary = summarize(evaluation, result)
        if summary.worst is not None and result.kv:
            lines.setdefault(result.policy.method, []).append(summary)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    longest = max(evaluation.suite.lengths)
    for axes, (kind, words) in zip(panels, KINDS.items(), strict=True):
        for index, (preset, found) in enumerate(lines.items()):
            found = sorted(found, key=lambda one: getattr(one.result.kv[-1], kind))
            across, color = [getattr(one.result.kv[-1], kind) / MEGABYTE for one in found], f"C{index % 10}"
            axes.plot(across, [100 * one.accuracy for one in found], "o-", color=color, label=preset)
            axes.plot(across, [100 * one.worst.accuracy for one in found], "x--", color=color)
        axes.set_xlabel(f"KV megabytes {words} at {longest} tokens")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("exact answers, % (dashed: worst learned cell)")
    panels[0].set_ylim(-3, 103)
    if lines:
        panels[1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
