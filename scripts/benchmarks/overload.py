"""What a server still answers when ten times as much is asked as it can do.

A server process with the model inside the package, and this process as its clients. Rounds take turns: first as many
clients as the server accepts, each with one request after the other, which gives the capacity; then requests that start
by a Poisson process at `--times` the best capacity so far, whether earlier ones were answered or not. Tokens count that
arrive in the last four fifths of a round. Answers differ in length, in both kinds of rounds: those of one length would
end together where clients wait for them and one by one where they do not, which is other work for the engine. On a
machine that others use too, the server's CPU time per token of a full answer, refusals included, is what can be
compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from benchmarks.process import Load, ticks_of
from benchmarks.report import markdown
from benchmarks.store import head
from sparsejax.cli.load import Answer

PROMPT, NEW_TOKENS = 32, (128, 384)
MEAN = sum(NEW_TOKENS) / 2
ASKED = {"temperature": 0.0, "ignore_eos": True, "stream": True, "return_token_ids": True}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=float, default=10.0, help="load over capacity (default: 10)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a round (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each kind (default: 5)")
    parser.add_argument("--rows", type=int, default=8, help="rows of the engine (default: 8)")
    parser.add_argument("--max-requests", type=int, default=16, help="what the server accepts (default: 16)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    rounds: list[dict[str, Any]] = []
    best = 0.0
    with started(args) as server:
        while not best:  # every program is compiled when it is needed first
            best = server.round(lambda s: closed(s, args.max_requests), args.seconds)["tokens_per_second"]
        for turn in range(args.rounds + 1):
            capacity = server.round(lambda s: closed(s, args.max_requests), args.seconds)
            best = max(best, capacity["tokens_per_second"])
            rate = args.times * best / MEAN
            overload = server.round(lambda s, rate=rate: opened(s, rate), args.seconds)
            if turn:  # the first one warms everything
                rounds.append({"capacity": capacity, "overload": {**overload, "rate": rate}})
                print(json.dumps(rounds[-1]), flush=True)
    workload = {"prompt": PROMPT, "new_tokens": NEW_TOKENS, "rows": args.rows, "max_requests": args.max_requests}
    stored = {**head(), "workload": {**workload, "times": args.times, "seconds": args.seconds}, "rounds": rounds}
    if args.out:
        args.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored))
    bad = any(one[kind]["failed"] or one[kind]["most_held"] > args.max_requests for one in rounds for kind in one)
    return 1 if bad else 0


class Round:
    """One round: what was asked and what came."""

    def __init__(self, address: tuple[str, int], seconds: float):
        self.start, self.seconds, self.answers, self.draw = time.perf_counter(), seconds, [], random.Random(0)
        self._address, self._arrived = address, []

    @property
    def over(self) -> bool:
        return time.perf_counter() - self.start >= self.seconds

    async def ask(self) -> None:
        """Sends one prompt and notes what comes and when; a connection each, as little work as a client can do."""
        answer, start = Answer(), time.perf_counter()
        self.answers.append(answer)
        prompt = [self.draw.randrange(100) for _ in range(PROMPT)]
        body = json.dumps({**ASKED, "prompt": prompt, "max_tokens": self.draw.randint(*NEW_TOKENS)}).encode()
        try:
            reader, writer = await asyncio.open_connection(*self._address)
            with contextlib.closing(writer):
                writer.write(HEAD % len(body) + body)
                status = (await reader.readline()).split()[1]
                answer.refused = status == b"503"
                answer.error = None if status == b"200" else status.decode()
                async for line in reader:
                    if line.startswith(b"data: {"):
                        count = len(json.loads(line[6:])["choices"][0]["token_ids"])
                        now = time.perf_counter()
                        answer.times.append(now - start)
                        answer.counts.append(count)
                        self._arrived.append((now - self.start, count))
        except (OSError, IndexError, KeyError, ValueError) as error:
            answer.error = repr(error)

    def rate(self) -> float:
        """Tokens per second in the last four fifths."""
        first = self.seconds / 5
        return sum(count for when, count in self._arrived if first <= when < self.seconds) / (self.seconds - first)


async def closed(now: Round, clients: int) -> None:
    """`clients` that each send one request after the other."""

    async def work() -> None:
        while not now.over:
            await now.ask()

    await asyncio.gather(*(work() for _ in range(clients)))


async def opened(now: Round, rate: float) -> None:
    """Requests at the times of a Poisson process."""
    asked, due = [], now.start
    while not now.over:
        asked.append(asyncio.create_task(now.ask()))
        due += now.draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    await asyncio.gather(*asked)


class started:  # noqa: N801  (a context manager)
    """The server process, and rounds against it."""

    def __init__(self, args: argparse.Namespace):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        self._command = [sys.executable, str(ROOT / "scripts/serve_openai.py"), "--port", str(self.address[1])]
        self._command += ["--max-num-seqs", str(args.rows), "--max-requests", str(args.max_requests)]
        self._command += ["--max-model-len", "512", "--warmup", "lazy", "--log-level", "warning"]

    def __enter__(self) -> started:
        self.process = subprocess.Popen(self._command, cwd=ROOT)
        while not self._ready():
            if self.process.poll() is not None:
                raise SystemExit("the server ended before it was ready")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is not None:
            print(f"the server ended with {self.process.returncode}", file=sys.stderr)
        self.process.terminate()
        self.process.wait()

    def _ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/ready", timeout=5).status == 200
        except OSError:
            return False

    def held(self) -> int:
        with urllib.request.urlopen(f"{self.url}/load", timeout=30) as answer:
            return json.load(answer)["server_load"]

    def round(self, drive: Callable[[Round], Coroutine[Any, Any, None]], seconds: float) -> dict[str, Any]:
        pids = self.process.pid, os.getpid()
        load, ticks, now = Load.now(self.process.pid), [ticks_of(pid) for pid in pids], Round(self.address, seconds)
        held = [0]

        async def watch() -> None:
            while not now.over:
                held.append(await asyncio.to_thread(self.held))
                await asyncio.sleep(0.25)

        async def both() -> None:
            await asyncio.gather(drive(now), watch())

        asyncio.run(both())
        used, clients = ((ticks_of(pid) - before) / 100 for pid, before in zip(pids, ticks, strict=True))
        good = [answer for answer in now.answers if answer.good]
        return {
            "asked": len(now.answers),
            "answered": len(good),
            "refused": sum(answer.refused for answer in now.answers),
            "failed": sum(not answer.good and not answer.refused for answer in now.answers),
            "tokens_per_second": now.rate(),
            "server_cpu_ms_per_token": 1000 * used / max(sum(answer.tokens for answer in good), 1),
            "clients_cpu_share": clients / seconds,
            "median_first_token": statistics.median([answer.times[0] for answer in good] or [0.0]),
            "slowest_first_token": max((answer.times[0] for answer in good), default=0.0),
            "most_held": max(held),
            "foreign_cpu": Load.now(self.process.pid).since(load)["foreign_cpu"],
        }


def table(stored: dict[str, Any]) -> str:
    """The stored rounds as Markdown, with the ratio of each pair."""
    rounds, work = stored["rounds"], stored["workload"]
    rows: list[tuple[str, ...]] = [("", "capacity", f"{work['times']:g} x capacity")]

    def row(title: str, field: str, shape: str) -> None:
        values = [[one[kind][field] for one in rounds] for kind in ("capacity", "overload")]
        rows.append((title, *(shape.format(statistics.median(value)) for value in values)))

    row("requests started in a round", "asked", "{:.0f}")
    row("answered in full", "answered", "{:.0f}")
    row("refused with 503", "refused", "{:.0f}")
    row("failed otherwise", "failed", "{:.0f}")
    row(f"most requests held (limit {work['max_requests']})", "most_held", "{:.0f}")
    row("tokens/s of answers", "tokens_per_second", "{:.0f}")
    row("server's CPU per token, ms", "server_cpu_ms_per_token", "{:.3f}")
    row("processors that the clients took", "clients_cpu_share", "{:.2f}")
    row("first token, median, s", "median_first_token", "{:.2f}")
    row("first token, slowest, s", "slowest_first_token", "{:.2f}")
    ratios = [one["overload"]["tokens_per_second"] / one["capacity"]["tokens_per_second"] for one in rounds]
    used = [one["capacity"]["server_cpu_ms_per_token"] / one["overload"]["server_cpu_ms_per_token"] for one in rounds]
    others = statistics.median(one[kind]["foreign_cpu"] or 0.0 for one in rounds for kind in one)
    least, most = work["new_tokens"]
    text = (
        f"\nGoodput under overload over capacity: {statistics.median(ratios):.2f} "
        f"({', '.join(f'{ratio:.2f}' for ratio in ratios)} in the single pairs of rounds); by the "
        f"server's CPU time: {statistics.median(used):.2f} ({', '.join(f'{ratio:.2f}' for ratio in used)}). "
        f"Medians of {len(rounds)} rounds of {work['seconds']:g} s each; {work['rows']} rows of the engine, "
        f"{work["prompt"]} prompt and {least} to {most} new tokens a request; "
        f"others used {others:.0%} of the processors meanwhile.\n"
    )
    return markdown(rows) + "\n" + text
