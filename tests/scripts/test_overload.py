"""The benchmark of overload: what it counts, and its table by hand."""

from __future__ import annotations

import time

from benchmarks import overload

from sparsejax.engine.request import CompletionOutput, RequestOutput
from sparsejax.serve.errors import Overloaded


def send(prompt):
    for _ in range(3):
        time.sleep(0.01)
        yield RequestOutput("a", None, None, outputs=[CompletionOutput(0, "x", [1, 2])])


def test_clients_that_take_turns_and_ones_that_do_not():
    now = overload.Round(send, 0.5)
    overload.closed(now, 4)
    assert len(now.answers) <= 4 * 17 and all(answer.tokens == 6 for answer in now.answers) and now.rate() > 0

    def refuse(prompt):
        raise Overloaded("busy", 1.0)
        yield

    now = overload.Round(refuse, 0.3)
    overload.opened(now, 100.0)
    assert 5 < len(now.answers) < 80 and all(answer.refused for answer in now.answers) and now.rate() == 0


def one(rate: float, cpu: float) -> dict:
    counts = {"asked": 10, "answered": 8, "refused": 2, "failed": 0, "most_held": 4, "foreign_cpu": 0.5}
    waits = {"median_first_token": 0.5, "slowest_first_token": 1.5}
    return {**counts, **waits, "tokens_per_second": rate, "server_cpu_ms_per_token": cpu}


def test_the_table():
    workload = {"times": 10.0, "seconds": 20.0, "rows": 2, "max_requests": 4, "prompt": 32, "new_tokens": 256}
    measured = ((90, 1.25), (95, 1.0), (99, 2))
    rounds = [{"capacity": one(100.0, 1.0), "overload": one(rate, cpu)} for rate, cpu in measured]
    text = overload.table({"workload": workload, "rounds": rounds})
    assert "| tokens/s of answers | 100 | 95 |" in text and "| most requests held (limit 4) | 4 | 4 |" in text
    assert "over capacity: 0.95 (0.90, 0.95, 0.99" in text and "CPU time: 0.80 (0.80, 1.00, 0.50)" in text
