"""The table of what each choice of a compressor costs (`python -m train.ablation --json`)."""

from __future__ import annotations

from typing import Any

from benchmarks.report import markdown

HEADER = ("changed", "bytes, % of bfloat16 at 128K", "relative error", "divergence, nats", "times the base")


def table(stored: dict[str, Any]) -> str:
    """Markdown: one row per setting that differs from the base, the base first."""
    rows, base = [HEADER], stored["rows"][0]["divergence"]
    for row in stored["rows"]:
        share, apart = f"{100 * row['share']:.1f}", row["divergence"]
        widths = row["latent"]
        name = row["changed"] + ("" if isinstance(widths, int) else f" ({', '.join(map(str, widths))})")
        rows.append((name, share, f"{row['error']:.4f}", f"{apart:.6f}", f"{apart / base:.2f}"))
    return f"{markdown(rows)}\n"
