"""The table of decode steps: milliseconds and the ratio to dense, per policy and context."""

from __future__ import annotations

import statistics

from benchmarks.report import markdown


def decode_table(results: dict, dtype: str) -> str:
    """Markdown: one row per policy, one column per context."""
    entry, load = results["dtypes"][dtype], results["workload"]
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    rounds = len({run["repetition"] for run in entry["runs"]})
    foreign = [run["foreign_cpu"] for run in entry["runs"] if run["foreign_cpu"] is not None]
    rows = [("reads", *(f"{context} tokens" for context in load["contexts"]))]
    for name in entry["policies"]:
        rows.append((name, *(cell(entry["runs"], name, context) for context in load["contexts"])))
    busy = f", others used {statistics.median(foreign):.0%} of the processors" if foreign else ""
    return (
        f"**{dtype}**: milliseconds of a full decode step of {load['rows']} rows, median (least to most) of {rounds} "
        f"interleaved repetitions of {load['steps']} steps, how many times faster than dense in the same repetition, "
        f"and the share of the pages read; budget {load['keep']} tokens, pages of {load['page_size']} "
        f"({results['machine']['cpu']}, {results['threads']} threads{busy}; {versions}).\n\n{markdown(rows)}\n"
    )


def cell(runs: list[dict], name: str, context: int) -> str:
    mine = {run["repetition"]: run for run in runs if (run["policy"], run["context"]) == (name, context)}
    if not mine:
        return "not measured"
    times = [1e3 * run["seconds"] for run in mine.values()]
    text = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
    dense = {run["repetition"]: run for run in runs if (run["policy"], run["context"]) == ("dense", context)}
    if name == "dense" or not dense:
        return text
    gain = statistics.median(dense[i]["seconds"] / run["seconds"] for i, run in mine.items())
    return f"{text}, {gain:.2f} x, {next(iter(mine.values()))['read']:.0%}"
