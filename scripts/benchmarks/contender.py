"""The process side of a contender: reads one JSON request per line, answers one JSON line each.

Standard library only, so that any interpreter can run it. A contender is ``load(settings)``, which returns
``serve`` and what a report should say about it (versions, settings); ``serve(requests)`` returns the new
token ids per request. The settings name the model, the dtype and the threads.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

Requests = list  # of (prompt token ids, number of new tokens)
Serve = Callable[[Requests], list]


def peak_mib(reset: bool = False) -> float:
    """Peak resident memory in MiB since the last reset (Linux; elsewhere since the start)."""
    status = {}
    try:
        with open("/proc/self/status") as lines:
            status = dict(line.split(":", 1) for line in lines)
        if reset:
            with open("/proc/self/clear_refs", "w") as control:
                control.write("5")
        return int(status["VmHWM"].split()[0]) / 1024
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def restrict(threads: int) -> None:
    """Allow this process ``threads`` cores, the same for every contender and seen by every thread pool."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)


def main(load: Callable[[dict], tuple[Serve, dict]], counters: Callable[[], dict] = dict) -> None:
    """Answer ``load`` once and then any number of ``run`` until the input ends.

    What libraries print goes to stderr: the standard output carries answers only. An answer also has what
    each of ``counters()`` grew by.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve: Serve | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            started, cpu = time.perf_counter(), time.process_time()
            if request["op"] == "load":
                restrict(request["threads"])
                serve, answer = load(request)
                before = counters()
            else:
                peak_mib(reset=True)
                before = counters()
                answer = {"tokens": serve(request["requests"])}
            seconds = time.perf_counter() - started
            answer |= {name: value - before[name] for name, value in counters().items()}
            answer |= {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "peak_mib": peak_mib()}
        except Exception:  # whatever went wrong belongs in the answer; the caller decides
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
    answers.flush()
    os._exit(0)  # a library's background threads must not keep the process
