"""Counts of what decode steps read, and of the attention probability that selections captured."""

from __future__ import annotations

from collections import Counter

from sparsejax.engine.state import Reads


def count_reads(reads: Reads, counters: Counter[str]) -> None:
    """Adds the reads of a step program, ``[steps, rows, ...]``, to the totals."""
    counters["decode_queries"] += int((reads.tiles[..., 0] > 0).sum())
    for name, tiles in zip(("held", "read"), reads.tiles.sum((0, 1)).tolist(), strict=True):
        counters[f"decode_tiles_{name}"] += tiles
    for name, lists in zip(("by_top_p", "at_budget"), reads.capped.sum((0, 1)).tolist(), strict=True):
        counters[f"lists_{name}"] += lists
    if reads.recall is None:
        return
    counters["recall_checks"] += int((reads.recall >= 0).any(-1).sum())
    for name, rows in zip(("widened", "dropped"), reads.more.sum((0, 1)).tolist(), strict=True):
        counters[f"budgets_{name}"] += rows
    for layer, captured in enumerate(reads.recall.reshape(-1, reads.recall.shape[-1]).T):
        measured = captured[captured >= 0]
        counters[f"recall_count_{layer}"] += len(measured)
        counters[f"recall_sum_{layer}"] += float(measured.sum())


def recall_stats(counters: Counter[str]) -> dict[str, float]:
    """``recall_layer_0`` ...: the mean share of attention probability that selections captured, where measured."""
    prefix = "recall_count_"
    counted = sorted((int(name.removeprefix(prefix)), n) for name, n in counters.items() if name.startswith(prefix))
    return {f"recall_layer_{layer}": counters[f"recall_sum_{layer}"] / n for layer, n in counted if n}
