"""Shows the records of a run and adds the peer that needs a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
PEER_SECONDS = 90


def show(record: Record) -> None:
    """One line about one case, as it ends."""
    what = {k: v for k, v in record.items() if k not in ("case", "status", "where", "took_s") and v}
    brief = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in what.items())
    print(f"{record['status']:<8} {record['case']}: {brief}", flush=True)


def torch_peer(tiny: bool) -> list[Record]:
    """Records of torch's attention on the shapes of the attention stage."""
    from suite import attention

    decode, prefill = attention.shapes(tiny)
    wanted = {f"decode {name}": s for name, s in decode.items() if attention.has_peers(s)}
    wanted |= {f"prefill {name}": s for name, s in prefill.items() if s.chunk == s.held and attention.has_peers(s)}
    given = {n: [s.rows, s.read or s.held, s.heads, s.kv_heads, s.head_dim, s.chunk] for n, s in wanted.items()}
    script = Path(__file__).with_name("torch_sdpa.py")
    try:
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(given)],
            capture_output=True,
            text=True,
            timeout=PEER_SECONDS,
        )
        results = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return [{"case": "attention/torch", "status": "skipped", "reason": str(error)[:300]}]
    found = []
    for name, outcome in results.items():
        record: Record = {
            "case": f"attention/{name}: torch, contiguous",
            "status": "skipped",
            "reason": outcome,
        }
        if not isinstance(outcome, str):
            moved = wanted[name].bytes
            record = {"case": record["case"], "status": "ok", "seconds": outcome, "bytes": moved}
            record["bytes_per_s"] = moved / outcome
            if wanted[name].chunk:
                record |= {"flops": wanted[name].flops, "flops_per_s": wanted[name].flops / outcome}
        show(record)
        found.append(record)
    return found


def table(records: Sequence[Record]) -> str:
    """Markdown table of what was timed; bandwidths as a share of the copy bandwidth of the run."""
    copied = next((r["copy_bytes_per_s"] for r in records if "copy_bytes_per_s" in r), None)
    rows = [["case", "microseconds", "GB read", "GB/s", "share of copy", "TFLOP/s"], ["---"] + ["---:"] * 5]
    for record in records:
        if "seconds" not in record:
            continue
        rate = record["bytes_per_s"]
        rows.append(
            [
                record["case"],
                f"{record['seconds'] * 1e6:.1f}",
                f"{record['bytes'] / 1e9:.3f}",
                f"{rate / 1e9:.0f}",
                f"{rate / copied:.1%}" if copied else "",
                f"{record['flops_per_s'] / 1e12:.1f}" if "flops_per_s" in record else "",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# What is to be reached at 8 KV heads x 128: a share of the copy bandwidth, or how much faster than another case.
SHARES = {"32 x 32K": 0.80, "32 x 32K, int8": 0.65, "32 x 32K, int4": 0.65}
FASTER = (
    ("decode 8 x 128K, lists of 2048: ours", "decode 8 x 128K dense: ours", 10.0),
    ("decode 32 x 32K: ours", "decode 32 x 32K: cuDNN, contiguous", 1.0),
    ("decode 32 x 32K: ours", "decode 32 x 32K: torch, contiguous", 1.0),
    ("latents 32 x 32768: ours", "latents 32 x 32768: dense, equal batch", 1.0),
)


def goals(records: Sequence[Record]) -> str:
    """Markdown table of what the kernels are to reach and what they did; goals of cases that did not run are left
    out."""
    seconds = {r["case"].removeprefix("attention/"): r["seconds"] for r in records if "seconds" in r}
    rates = {r["case"].removeprefix("attention/"): r["bytes_per_s"] for r in records if "seconds" in r}
    copied = next((r["copy_bytes_per_s"] for r in records if "copy_bytes_per_s" in r), None)
    found = []
    for name, share in SHARES.items():
        case = f"decode {name}: ours"
        if copied and case in rates:
            reached = rates[case] / copied
            found.append((f"{case}, of the copy bandwidth", f"{share:.0%}", f"{reached:.1%}", reached >= share))
    for case, other, times in FASTER:
        if case in seconds and other in seconds:
            reached = seconds[other] / seconds[case]
            found.append((f"{case}, against {other}", f"{times:g} x", f"{reached:.2f} x", reached >= times))
    rows = [["goal", "wanted", "measured", ""], ["---", "---:", "---:", "---"]]
    rows += [[*goal[:3], "reached" if goal[3] else "missed"] for goal in found]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) if found else ""


def default_path(records: Sequence[Record], root: Path) -> Path:
    """docs/results/gpu_suite_<device>.json."""
    device = next((r["device"] for r in records if r["case"] == "machine"), "unknown")
    return root / "docs" / "results" / f"gpu_suite_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"
