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
ANSWERS = {"mean of the learned cells": lambda one: one.accuracy, "worst learned cell": lambda one: one.worst.accuracy}
MARKERS = "osD^v"
MEGABYTE = 1e6


def draw(evaluation: Evaluation, path: str | Path) -> None:
    """Writes a picture of accuracy against bytes held and bytes read: one line per preset over its budgets.

    The mean of the learned cells stands above, the worst of them below.
    """
    pyplot = load_pyplot()
    lines: dict[str, list[Summary]] = {}
    for result in evaluation.results:
        summary = summarize(evaluation, result)
        if summary.worst is not None and result.kv:
            lines.setdefault(result.policy.method, []).append(summary)
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 7), sharex=True, sharey=True, layout="constrained")
    for row, (title, answer) in zip(panels, ANSWERS.items(), strict=True):
        row[0].set_ylabel(f"exact answers, %: {title}")
        for axes, kind in zip(row, KINDS, strict=True):
            for index, (preset, found) in enumerate(lines.items()):
                points = sorted((getattr(one.result.kv[-1], kind) / MEGABYTE, 100 * answer(one)) for one in found)
                style = {"color": pyplot.cm.tab20(index % 20), "marker": MARKERS[index % len(MARKERS)]}
                axes.plot(*zip(*points, strict=True), label=preset, **style)
            axes.grid(alpha=0.3)
    longest = max(evaluation.suite.lengths)
    for axes, words in zip(panels[1], KINDS.values(), strict=True):
        axes.set_xlabel(f"KV megabytes {words} at {longest} tokens")
    panels[0, 0].set_xlim(left=0)
    panels[0, 0].set_ylim(-3, 103)
    if lines:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
