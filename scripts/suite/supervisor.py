"""Runs the worker, watches its records, and starts it again past a case that hangs or kills it."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from suite.records import MARK

RESTARTS = 8


def supervise(
    command: Sequence[str], *, deadline: float, case_seconds: float, show: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Records of every case of `command`, a worker that takes `--skip CASE...` as its last option.

    A case that says nothing for `case_seconds` is killed with its worker and recorded as hung, one that takes
    its worker down as crashed; a new worker goes on after it.
    """
    records: dict[str, dict[str, Any]] = {}
    for _ in range(RESTARTS):
        done = [name for name, record in records.items() if record["status"] != "started"]
        status = _run(list(command) + ["--skip", *done], records, deadline, case_seconds, show)
        if status == 0:
            break
        for name, record in records.items():
            if record["status"] == "started":
                record |= {"status": "error", "reason": "hung" if status is None else f"crashed ({status})"}
                show({"case": name, **record})
        if time.time() > deadline:
            break
    return [{"case": name, **record} for name, record in records.items()]


def _run(command, records, deadline, case_seconds, show) -> int | None:
    """One worker; its exit status, None if it was killed for hanging."""
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        # The worker itself stops at the deadline; only a case in progress may run past it.
        patience = min(case_seconds, max(20.0, deadline + 20 - time.time()))
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            worker.kill()
            worker.wait()
            return None
        if line is None:
            return worker.wait()
        if not line.startswith(MARK):
            print(line, end="", flush=True)
            continue
        record = json.loads(line[len(MARK) :])
        name = record.pop("case")
        records[name] = record
        if record["status"] != "started":
            show({"case": name, **record})
