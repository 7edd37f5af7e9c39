"""Tables of what choices of a compressor cost: one by one (`python -m train.ablation --json`), and layer by layer (the
report of a run of `python -m train.deltakv`)."""

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


def layers(stored: dict[str, Any]) -> str:
    """The report's own table in Markdown, and what the compressor takes and loses as a whole."""
    share, apart = 100 * stored["share_of_bytes"], stored["held_out"]["divergence"]
    whole = f"{share:.1f}% of the bytes of bfloat16 pages at 128K tokens; divergence of answers {apart:.6f} nats."
    return f"{markdown(list(map(tuple, stored['table'])))}\n\n{whole}\n"
