"""Tables from stored results: medians with spread, and the ratio to the best mode of the peer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

OURS = "sparsejax"
NAMES = {
    "transformers one_by_one": "transformers, one by one",
    "transformers static": "transformers, one padded batch",
    "transformers sorted": "transformers, sorted batches of 4",
    "transformers continuous": "transformers, continuous batching",
}
HEADER = (
    "engine",
    "seconds (min to max, IQR)",
    "new tokens/s",
    "CPU seconds",
    "peak MiB",
    "others' CPU",
    "same answers",
)


def spread(values: Sequence[float]) -> str:
    """Median, range and interquartile range."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [0.0] * 3
    width = quartiles[2] - quartiles[0]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}, {width:.2f})"


def by_contender(entry: dict) -> dict[str, list[dict]]:
    runs: dict[str, list[dict]] = {}
    for run in sorted(entry["runs"], key=lambda run: run["repetition"]):
        runs.setdefault(run["contender"], []).append(run)
    return runs


def median(runs: list[dict], field: str) -> float:
    return statistics.median(run[field] for run in runs)


def serve_rows(entry: dict, requests: int) -> list[tuple[str, ...]]:
    """One row per contender, ours first, then the peer's modes from the fastest."""
    grouped = by_contender(entry)
    order = sorted(grouped, key=lambda name: (name != OURS, median(grouped[name], "seconds")))
    rows = []
    for name in order:
        runs = grouped[name]
        foreign = [run["foreign_cpu"] for run in runs if run["foreign_cpu"] is not None]
        rows.append(
            (
                NAMES.get(name, name),
                spread([run["seconds"] for run in runs]),
                f"{runs[0]['new_tokens'] / median(runs, 'seconds'):.1f}",
                f"{median(runs, 'cpu_seconds'):.1f}",
                f"{max(run['peak_mib'] for run in runs):.0f}",
                f"{statistics.median(foreign):.0%}" if foreign else "unknown",
                f"{sum(run['same_tokens'] for run in runs)} of {len(runs) * requests}",
            )
        )
    return rows


def ratio_text(entry: dict) -> str | None:
    """How our throughput compares with the best mode of the peer, by medians and repetition by repetition."""
    grouped = by_contender(entry)
    peers = {name: runs for name, runs in grouped.items() if name != OURS}
    if OURS not in grouped or not peers:
        return None
    best = min(peers, key=lambda name: median(peers[name], "seconds"))
    pairs = [a["seconds"] / b["seconds"] for a, b in zip(peers[best], grouped[OURS], strict=True)]
    middle = median(peers[best], "seconds") / median(grouped[OURS], "seconds")
    return (
        f"{middle:.2f} x the throughput of the best mode ({NAMES.get(best, best)}); "
        f"within single repetitions {min(pairs):.2f} to {max(pairs):.2f} x."
    )


def serve_table(results: dict, dtype: str) -> str:
    """The Markdown section of one dtype."""
    entry, load = results["dtypes"][dtype], results["workload"]
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    rounds = len({run["repetition"] for run in entry["runs"]})
    lines = [
        f"**{dtype}**: {load['requests']} requests, {load['prompt_tokens']} prompt and {load['new_tokens']} "
        f"new tokens, {rounds} interleaved repetitions after one warm-up each, {results['threads']} threads "
        f"({results['machine']['cpu']}; {versions}).",
        "",
        markdown([HEADER, *serve_rows(entry, load["requests"])]),
    ]
    if text := ratio_text(entry):
        lines += ["", f"sparsejax has {text}"]
    return "\n".join(lines) + "\n"


def markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body))
