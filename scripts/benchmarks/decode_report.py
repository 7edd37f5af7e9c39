"""The table of decode steps: milliseconds, the ratio to dense and what is read, per context and policy."""

from __future__ import annotations

import statistics

from benchmarks.report import markdown

HEADER = ("tokens", "reads", "ms (least to most), processor ms", "times dense, by processor time", "pages read")


def decode_table(results: dict, dtype: str) -> str:
    """Markdown: one row per context and policy."""
    entry, load = results["dtypes"][dtype], results["workload"]
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    last: dict[int, int] = {}
    for run in entry["runs"]:
        last[run["context"]] = max(run["repetition"], last.get(run["context"], 0))
    rounds = " or ".join(str(count + 1) for count in sorted(set(last.values())))
    foreign = [run["foreign_cpu"] for run in entry["runs"] if run["foreign_cpu"] is not None]
    busy = f"; others used {statistics.median(foreign):.0%} of the processors meanwhile" if foreign else ""
    rows = [HEADER]
    for context in sorted({run["context"] for run in entry["runs"]}):
        measured = {run["policy"] for run in entry["runs"] if run["context"] == context}
        names = [name for name in entry["policies"] if name in measured]
        rows += [(str(context), name, *cells(entry["runs"], name, context)) for name in names]
    return (
        f"**{dtype}**: milliseconds of a full decode step of {load['rows']} rows, median of {rounds} interleaved "
        f"repetitions of {load['steps']} steps, by the clock and of all threads together; times faster than dense are "
        f"medians over repetitions. Budget {load['keep']} tokens, pages of {load['page_size']} "
        f"({results['machine']['cpu']}, {results['threads']} threads{busy}; {versions}).\n\n{markdown(rows)}\n"
    )


def cells(runs: list[dict], name: str, context: int) -> tuple[str, str, str]:
    """Times, gains and pages read of one policy at one context."""
    mine, dense = (
        {run["repetition"]: run for run in runs if (run["policy"], run["context"]) == (policy, context)}
        for policy in (name, "dense")
    )
    times = [1e3 * run["seconds"] for run in mine.values()]
    cpu = 1e3 * statistics.median(run["cpu_seconds"] for run in mine.values())
    text = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}), {cpu:.1f}"
    gains = [
        f"{statistics.median(dense[i][field] / run[field] for i, run in mine.items()):.2f} x"
        for field in ("seconds", "cpu_seconds")
        if dense and name != "dense"
    ]
    return text, ", ".join(gains), f"{next(iter(mine.values()))['read']:.0%}"
