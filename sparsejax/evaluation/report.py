"""An evaluation as text for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

from sparsejax.evaluation.results import CellResult, Evaluation, PolicyResult
from sparsejax.evaluation.statistics import paired_difference, wilson
from sparsejax.evaluation.suite import CASES
from sparsejax.evaluation.summary import Summary, cliffs, is_learned, learned_cells, summarize

EXAMPLES = 3  # wrong replies kept per cell


def percent(cell: CellResult) -> str:
    """``97.5 [90-99]``: exact answers with their Wilson 95% interval, in percent."""
    low, high = wilson(sum(cell.right), len(cell.right))
    return f"{100 * cell.accuracy:.1f} [{100 * low:.0f}-{100 * high:.0f}]"


def as_text(evaluation: Evaluation) -> str:
    """Accuracy by case and length for every policy, what it cost, where it fails, and what was not learned."""
    suite, learned = evaluation.suite, learned_cells(evaluation)
    lines = [
        f"{evaluation.model}: {suite.samples} documents per cell, seed {suite.seed}, greedy, exact answers in percent "
        "with Wilson 95% intervals",
        "",
    ]
    for result in evaluation.results:
        lines += _policy(evaluation, result)
    lines += ["Cliff (fewest bytes read with at most one point lost on the worst learned cell):"]
    lines += [f"  {method}: {_cliff(found)}" for method, found in cliffs(evaluation).items()]
    missing = [cell for cell in evaluation.dense.cells if not is_learned(cell)]
    if missing:
        lines += ["", "Not learned (dense below 90%; these cells say nothing about compression):"]
        lines += [f"  {cell.case} at {cell.length}: {percent(cell)}" for cell in missing]
    for case, length, reason in evaluation.skipped:
        lines.append(f"  {case} at {length} was left out: {reason}")
    return "\n".join([*lines, "", f"{len(learned)} learned cells, {evaluation.seconds:.0f} s in all"])


def _policy(evaluation: Evaluation, result: PolicyResult) -> list[str]:
    summary, dense = summarize(evaluation, result), result is evaluation.dense
    lines = [result.policy.label, *markdown(result)]
    for one in () if dense else summary.differences:
        where = f"{one.cell.case} at {one.cell.length}"
        lines.append(f"  {where}: {100 * one.value:+.1f} [{100 * one.low:+.0f} to {100 * one.high:+.0f}] to dense")
    if summary.worst is not None:
        worst = summary.worst
        lines.append(
            f"  learned cells: mean {100 * summary.accuracy:.1f}, worst {worst.case} at {worst.length} {percent(worst)}"
        )
    for kv in result.kv:
        held = f"{kv.held:,.0f} bytes held ({kv.per_token:,.0f} per token), {kv.peak:,} at the peak"
        bounds = f" and {kv.bounds:,.0f} of key bounds" if kv.bounds else ""
        step = f"{kv.read:,.0f}{bounds} read by a decode step of {1e3 * kv.seconds:.1f} ms"
        lines.append(f"  KV at {kv.length} tokens: {held}, {step}")
    rate = f"{result.tokens_per_second:,.0f} tokens/s (prompts and replies)"
    less = f"{summary.saving:.2f} times fewer bytes read, {summary.compression:.2f} times fewer held"
    lines.append(f"  {rate}" if dense else f"  {less}, {rate}")
    return [*lines, ""]


def markdown(result: PolicyResult) -> list[str]:
    """A Markdown table: a line per case, a column per length."""
    lengths = sorted({cell.length for cell in result.cells})
    lines = ["| case | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for case in dict.fromkeys(cell.case for cell in result.cells):
        found = [result.find(case, length) for length in lengths]
        lines.append(f"| {case} | " + " | ".join(percent(cell) if cell else "-" for cell in found) + " |")
    return lines


def _cliff(found: Summary | None) -> str:
    if found is None:
        return "none of the budgets keeps every learned cell"
    return f"{found.saving:.2f} times fewer bytes read ({found.result.policy.label})"


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Everything as plain values; all but the `timing` entries repeat exactly for the same seeds."""
    suite = evaluation.suite
    return {
        "model": evaluation.model,
        "suite": {
            "cases": list(suite.cases),
            "lengths": list(suite.lengths),
            "samples": suite.samples,
            "seed": suite.seed,
            "protocols": {case: CASES[case].protocol for case in suite.cases},
        },
        "policies": [_policy_json(evaluation, result) for result in evaluation.results],
        "cliffs": {
            method: None if found is None else {"policy": found.result.policy.label, "saving": found.saving}
            for method, found in cliffs(evaluation).items()
        },
        "not_learned": [[cell.case, cell.length] for cell in evaluation.dense.cells if not is_learned(cell)],
        "skipped": [list(one) for one in evaluation.skipped],
        "timing": {"seconds": round(evaluation.seconds, 1)},
    }


def _policy_json(evaluation: Evaluation, result: PolicyResult) -> dict[str, Any]:
    summary = summarize(evaluation, result)
    worst = summary.worst
    compressor = {} if result.compressor is None else {"compressor": result.compressor}
    return compressor | {
        "policy": result.policy.label,
        "preset": result.policy.preset,
        "budget": result.policy.budget,
        "changed": dict(result.policy.changed),
        "learned_mean": summary.accuracy,
        "worst": None if worst is None else [worst.case, worst.length, worst.accuracy],
        "compression": summary.compression,
        "saving": summary.saving,
        "kv": [
            {
                "length": kv.length,
                "held_bytes": kv.held,
                "peak_bytes": kv.peak,
                "read_bytes": kv.read,
                "bounds_bytes": kv.bounds,
                "timing": {"step_seconds": round(kv.seconds, 6)},
            }
            for kv in result.kv
        ],
        "cells": [_cell_json(evaluation, cell) for cell in result.cells],
        "timing": {"tokens_per_second": round(result.tokens_per_second, 1)},
    }


def _cell_json(evaluation: Evaluation, cell: CellResult) -> dict[str, Any]:
    dense = evaluation.dense.find(cell.case, cell.length)
    difference = paired_difference(cell.right, dense.right) if dense is not None and dense is not cell else None
    wrong = [
        {"expected": expected, "reply": reply}
        for right, expected, reply in zip(cell.right, cell.expected, cell.replies, strict=True)
        if not right
    ]
    return {
        "case": cell.case,
        "length": cell.length,
        "right": sum(cell.right),
        "samples": len(cell.right),
        "accuracy": cell.accuracy,
        "interval": list(wilson(sum(cell.right), len(cell.right))),
        "difference": difference and difference[0],
        "difference_interval": difference and list(difference[1:]),
        "recall": cell.recall,
        "outcomes": "".join("1" if right else "0" for right in cell.right),
        "wrong": wrong[:EXAMPLES],
        "timing": {"tokens": cell.tokens, "seconds": round(cell.seconds, 3)},
    }
