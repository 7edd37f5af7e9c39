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


def gains_table(results: dict, dtype: str) -> str:
    """Markdown: how many times faster than dense a policy's step is, one column per context."""
    entry, load = results["dtypes"][dtype], results["workload"]
    contexts = sorted({run["context"] for run in entry["runs"]})
    rows = [("a decode step, times dense", *(f"{context} tokens" for context in contexts))]
    for name in [name for name in entry["policies"] if name != "dense"]:
        if any(run["policy"] == name for run in entry["runs"]):
            rows.append((name, *(gain(entry["runs"], name, context, "seconds") for context in contexts)))
    return (
        f"{results['model']['layers']} layers of a random model in {dtype}, {load['rows']} rows, budget {load['keep']} "
        f"tokens ({results['machine']['cpu']}, {results['threads']} threads):\n\n{markdown(rows)}\n"
    )


def gain(runs: list[dict], name: str, context: int, field: str) -> str:
    """The median over repetitions of dense over this policy; nothing where either was not measured."""
    mine, dense = (
        {run["repetition"]: run[field] for run in runs if (run["policy"], run["context"]) == (policy, context)}
        for policy in (name, "dense")
    )
    return f"{statistics.median(dense[i] / one for i, one in mine.items()):.2f} x" if mine and dense else ""


def cells(runs: list[dict], name: str, context: int) -> tuple[str, str, str]:
    """Times, gains and pages read of one policy at one context."""
    mine = [run for run in runs if (run["policy"], run["context"]) == (name, context)]
    times = [1e3 * run["seconds"] for run in mine]
    cpu = 1e3 * statistics.median(run["cpu_seconds"] for run in mine)
    text = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}), {cpu:.1f}"
    gains = [gain(runs, name, context, field) for field in ("seconds", "cpu_seconds") if name != "dense"]
    return text, ", ".join(filter(None, gains)), f"{mine[0]['read']:.0%}"
