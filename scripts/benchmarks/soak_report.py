"""What a soak (`scripts/soak.py`) left, in words."""

from __future__ import annotations

from typing import Any


def text(stored: dict[str, Any]) -> str:
    """The stored soak as a sentence."""
    load, report = stored["load"], stored["report"]
    sizes = [size for size in report["resident_mib"] if size is not None]
    memory = f", its memory stayed between {min(sizes):,.0f} and {max(sizes):,.0f} MiB" if sizes else ""
    return (
        f"{load['clients']} streaming clients beside {load['leavers']} that leave at random, for {load['seconds']:g} "
        f"s: {report['answers']:,} answers, {report['wrong']} of them wrong, {report['left']:,} left half way, "
        f"{report['busy']:,} told that the server is busy, {report['errors']} errors. Afterwards the server held "
        f"{report['kv_live_pages']:.0f} pages and {report['admitted_requests']:.0f} requests; it compiled "
        f"{report['compiles_after_warmup_total']:.0f} programs after its warm-up{memory}.\n"
    )
