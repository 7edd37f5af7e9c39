"""The benchmark of overload: what it counts, and its table by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from benchmarks import overload

LINE = b"data: " + json.dumps({"choices": [{"token_ids": [1, 2]}]}).encode() + b"\n\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Three lines of two tokens each."""
    await reader.readuntil(b"}")
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(3):
        await asyncio.sleep(0.01)
        writer.write(LINE)
    writer.close()


async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"}")
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
    writer.close()


def round_against(server: Callable[..., Awaitable[None]], seconds: float, load: Callable) -> overload.Round:
    async def run() -> overload.Round:
        async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
            now = overload.Round(listening.sockets[0].getsockname(), seconds)
            await load(now)
            return now

    return asyncio.run(run())


def test_clients_that_take_turns_and_ones_that_do_not():
    now = round_against(serve, 0.5, lambda now: overload.closed(now, 4))
    assert 4 <= len(now.answers) <= 4 * 17 and now.rate() > 0
    assert all(answer.tokens == 6 and answer.error is None for answer in now.answers)
    now = round_against(refuse, 0.3, lambda now: overload.opened(now, 100.0))
    assert 5 < len(now.answers) < 80 and all(answer.refused for answer in now.answers) and now.rate() == 0


def one(rate: float, cpu: float) -> dict:
    counts = {"asked": 10, "answered": 8, "refused": 2, "failed": 0, "most_held": 4, "foreign_cpu": 0.5}
    waits = {"median_first_token": 0.5, "slowest_first_token": 1.5}
    waits["clients_cpu_share"] = 0.1
    return {**counts, **waits, "tokens_per_second": rate, "server_cpu_ms_per_token": cpu}


def test_the_table():
    workload = {"times": 10.0, "seconds": 20.0, "rows": 2, "max_requests": 4, "prompt": 32, "new_tokens": [128, 384]}
    measured = ((90, 1.25), (95, 1.0), (99, 2))
    rounds = [{"capacity": one(100.0, 1.0), "overload": one(rate, cpu)} for rate, cpu in measured]
    text = overload.table({"workload": workload, "rounds": rounds})
    assert "| tokens/s of answers | 100 | 95 |" in text and "| most requests held (limit 4) | 4 | 4 |" in text
    assert "over capacity: 0.95 (0.90, 0.95, 0.99" in text and "CPU time: 0.80 (0.80, 1.00, 0.50)" in text
