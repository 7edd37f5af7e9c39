"""What a case says about itself: one JSON line when it starts, one when it ends."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TextIO

MARK = "@case "
BROKEN = 3  # exit status of a worker whose device no longer computes

type Run = Callable[[], dict[str, Any]]


class Unavailable(Exception):
    """A peer that this machine does not have: nothing to compare with, and no failure."""


def emit(record: dict[str, Any], stream: TextIO | None = None) -> None:
    """Writes one record for the supervisor."""
    print(MARK + json.dumps(record), file=stream or sys.stdout, flush=True)


def run_cases(
    stage: str,
    cases: Iterable[tuple[str, Run]],
    *,
    skip: set[str],
    deadline: float,
    alive: Callable[[], bool],
) -> None:
    """Runs cases one after another; one that fails is recorded and the next one runs.

    `skip` holds "stage/name" of those already done, `deadline` is in time.time() seconds, `alive` says
    whether the device still computes. Raises SystemExit(BROKEN) if it does not.
    """
    for name, run in cases:
        key = f"{stage}/{name}"
        if key in skip:
            continue
        if time.time() > deadline:
            emit({"case": key, "status": "skipped", "reason": "out of time"})
            continue
        emit({"case": key, "status": "started"})
        start = time.perf_counter()
        try:
            values = run()
        except Unavailable as error:
            record = {"status": "unavailable", "reason": str(error)}
        except Exception as error:  # noqa: BLE001 (whatever a case raises, the others are to be seen too)
            record = {"status": "error", "reason": f"{type(error).__name__}: {error}"[:2000]}
            record["where"] = traceback.format_exc(limit=-3)[-1500:]
        else:
            record = {"status": "ok", **values}
        emit({"case": key, **record, "took_s": round(time.perf_counter() - start, 3)})
        if record["status"] == "error" and not alive():
            raise SystemExit(BROKEN)
