"""Result files: what was measured, where, and with what."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine

SAME = ("machine", "threads", "model", "workload")


def head() -> dict[str, Any]:
    """The part every result file starts with."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
    }


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write the results. Dtypes that an earlier run of the same workload on the same machine left in the
    file, and this run has not, stay.
    """
    if path is None:
        return
    kept: dict[str, Any] = {}
    if path.exists():
        earlier, plain = json.loads(path.read_text()), json.loads(json.dumps(results))
        if all(earlier.get(name) == plain[name] for name in SAME):
            kept = earlier["dtypes"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**results, "dtypes": {**kept, **results["dtypes"]}}, indent=1) + "\n")
    partial.rename(path)
