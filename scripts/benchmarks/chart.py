"""A picture of stored serving results: new tokens per second of every engine, as SVG."""

from __future__ import annotations

from html import escape

from benchmarks.report import NAMES, OURS, by_contender, median

WIDTH, LABEL, BAR, GAP, TOP = 790, 260, 20, 9, 34
COLOURS = {True: "#2563a8", False: "#a9b4c0"}
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


def rates(runs: list[dict]) -> tuple[float, float, float]:
    """New tokens per second: of the median repetition, the slowest and the fastest one."""
    new, seconds = runs[0]["new_tokens"], [run["seconds"] for run in runs]
    return new / median(runs, "seconds"), new / max(seconds), new / min(seconds)


def serve_chart(results: dict) -> str:
    """Bars from the fastest engine down, a block per dtype; whiskers reach to the extreme repetitions."""
    blocks = {
        dtype: sorted(
            ((name, *rates(runs)) for name, runs in by_contender(entry).items()), key=lambda bar: -bar[1]
        )
        for dtype, entry in results["dtypes"].items()
    }
    top = max(fastest for bars in blocks.values() for *_, fastest in bars)
    scale = (WIDTH - LABEL - 70) / top
    parts, y = [], 12
    for dtype, bars in blocks.items():
        parts.append(text(8, y + 16, f"{dtype}: new tokens per second", weight="600"))
        y += TOP
        for name, middle, slowest, fastest in bars:
            parts += bar(y, name, middle * scale, slowest * scale, fastest * scale, f"{middle:.0f}")
            y += BAR + GAP
        y += 12
    parts.append(text(8, y + 8, caption(results), size=11, fill="#5b6672"))
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{y + 22}' "
        f"viewBox='0 0 {WIDTH} {y + 22}' role='img'>\n"
        f"<title>{escape(caption(results))}</title>\n"
        f"<rect width='100%' height='100%' fill='#ffffff'/>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def bar(y: int, name: str, middle: float, slowest: float, fastest: float, label: str) -> list[str]:
    """One bar with its name, its whisker and its value."""
    centre = y + BAR / 2
    ends = "".join(
        f"<path d='M{LABEL + x:.1f} {centre - 4}v8' stroke='#1f2933'/>" for x in (slowest, fastest)
    )
    fill = COLOURS[name == OURS]
    return [
        text(LABEL - 8, centre + 4, NAMES.get(name, name), anchor="end"),
        f"<rect x='{LABEL}' y='{y}' width='{middle:.1f}' height='{BAR}' rx='2' fill='{fill}'/>",
        f"<path d='M{LABEL + slowest:.1f} {centre}H{LABEL + fastest:.1f}' stroke='#1f2933'/>{ends}",
        text(LABEL + max(middle, fastest) + 8, centre + 4, label, weight="600"),
    ]


def text(
    x: float, y: float, words: str, *, size: int = 13, anchor: str = "start", weight: str = "400",
    fill: str = "#1f2933",
) -> str:  # fmt: skip
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' font-weight='{weight}' "
        f"text-anchor='{anchor}' fill='{fill}'>{escape(words)}</text>"
    )


def caption(results: dict) -> str:
    load = results["workload"]
    counts = {len(runs) for entry in results["dtypes"].values() for runs in by_contender(entry).values()}
    return (
        f"{load['requests']} requests, {load['prompt_tokens']} prompt and {load['new_tokens']} new tokens, "
        f"median of {min(counts)} repetitions, {results['threads']} threads, {results['machine']['cpu']}"
    )
