"""Holds a running HTTP server under streaming clients and clients that leave at random, and checks every answer.

    python scripts/soak.py --url http://127.0.0.1:8000 --clients 64 --leavers 64 --seconds 120

Each client asks greedy and seeded questions out of a fixed set, whose whole answers were asked for once before, alone.
A line every few seconds shows answers, memory of the server (with --pid, Linux) and what the server holds. The exit
status is 1 if an answer was wrong, a request failed otherwise than by being told that the server is busy, or pages or
requests are left in the end; --out writes what happened as JSON. Needs the openai client (extra ``test``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import openai
from benchmarks.store import head

WORDS = "box lamp apple door stone river cloud 日本 ünï 🎉".split()
NUM_QUESTIONS = 12
BUSY = (openai.InternalServerError, openai.RateLimitError)


def question(index: int) -> dict[str, Any]:
    """The request of one question: some are greedy, some sample, some have stop strings or several samples."""
    rng = random.Random(index)
    prompt = " ".join(f"{rng.choice(WORDS)}: {rng.randint(100, 999)};" for _ in range(rng.randint(1, 12)))
    options: dict[str, Any] = {"prompt": " " + prompt, "max_tokens": rng.randint(4, 64), "seed": index}
    options["temperature"] = rng.choice([0.0, 0.8])
    if options["temperature"] and rng.random() < 0.3:
        options["n"] = 2
    if rng.random() < 0.3:
        options["stop"] = ["e", "11"]
    return options


async def ask(client: openai.AsyncOpenAI, model: str, index: int) -> list[str]:
    """The streamed texts of all samples of one question."""
    options = question(index)
    texts = [""] * options.get("n", 1)
    async for chunk in await client.completions.create(model=model, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return texts


async def leave(client: openai.AsyncOpenAI, model: str, index: int, rng: random.Random) -> None:
    """Starts one question and goes away: before the first byte, or in the middle of the stream."""
    options = {**question(index), "max_tokens": 400}
    pieces = rng.randint(0, 12)
    async with asyncio.timeout(rng.choice([0.01, 0.1, 30.0])):
        stream = await client.completions.create(model=model, stream=True, **options)
        async with stream:
            async for _ in stream:
                pieces -= 1
                if pieces < 0:
                    return


async def run(
    url: str, model: str, clients: int, leavers: int, seconds: float, seed: int, key: str, pid: int | None
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    first_error, resident = "", []
    limits = openai.DefaultAsyncHttpxClient(limits=_limits(clients + leavers), timeout=120.0)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=limits) as client:
        wanted = [await ask(client, model, index) for index in range(NUM_QUESTIONS)]
        end = time.monotonic() + seconds

        async def reader(number: int) -> None:
            nonlocal first_error
            rng = random.Random(f"{seed}-{number}")
            while time.monotonic() < end:
                index = rng.randrange(NUM_QUESTIONS)
                try:
                    texts = await ask(client, model, index)
                except BUSY:
                    counts["busy"] += 1
                    await asyncio.sleep(rng.random())
                except openai.OpenAIError as error:
                    counts["errors"] += 1
                    first_error = first_error or repr(error)
                else:
                    counts["answers"] += 1
                    counts["wrong"] += texts != wanted[index]

        async def leaver(number: int) -> None:
            rng = random.Random(f"{seed}-leaver-{number}")
            while time.monotonic() < end:
                try:
                    await leave(client, model, rng.randrange(NUM_QUESTIONS), rng)
                except (TimeoutError, *BUSY):
                    pass
                counts["left"] += 1
                await asyncio.sleep(0.1 * rng.random())

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(min(5.0, seconds))
                held = await asyncio.to_thread(gauges, url)
                resident.append(resident_mib(pid))
                print(json.dumps({**counts, **held, "resident_mib": resident[-1]}), flush=True)

        work = [reader(number) for number in range(clients)] + [leaver(number) for number in range(leavers)]
        await asyncio.gather(*work, watch())
    report = {"answers": 0, "left": 0, "busy": 0, "wrong": 0, "errors": 0, **counts, "first_error": first_error}
    return {**report, "resident_mib": resident, **await asyncio.to_thread(settled, url)}


def _limits(count: int) -> Any:
    import httpx2

    return httpx2.Limits(max_connections=count, max_keepalive_connections=count)


def gauges(url: str) -> dict[str, float]:
    """What the server holds now, from its metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    names = ("kv_live_pages", "admitted_requests", "compiles_after_warmup_total")
    return {name: float(re.search(rf"^sparsejax:{name}(?:{{.*}})? (\S+)$", text, re.M)[1]) for name in names}


def settled(url: str) -> dict[str, float]:
    """`gauges` once nothing runs any more, or after ten seconds."""
    for _ in range(100):
        held = gauges(url)
        if not held["admitted_requests"] and not held["kv_live_pages"]:
            break
        time.sleep(0.1)
    return held


def resident_mib(pid: int | None) -> float | None:
    """Memory of a process, where the system tells."""
    status = Path(f"/proc/{pid}/status")
    if pid is None or not status.exists():
        return None
    return round(int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024, 1)


def soak(
    url: str, *, model: str, clients: int, leavers: int, seconds: float, seed: int = 0, key: str = "none",
    pid: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs the clients and returns what happened: counts, and what the server holds in the end."""
    return asyncio.run(run(url, model, clients, leavers, seconds, seed, key, pid))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="sparsejax-embedded")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--leavers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", default="none")
    parser.add_argument("--pid", type=int, help="process of the server, to watch its memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    report = soak(**settings)
    print(json.dumps(report))
    if args.out:
        load = {name: settings[name] for name in ("clients", "leavers", "seconds")}
        args.out.write_text(json.dumps({**head(), "load": load, "report": report}, indent=1) + "\n")
    left = report["kv_live_pages"] or report["admitted_requests"]
    return 1 if report["wrong"] or report["errors"] or left or not report["answers"] else 0


if __name__ == "__main__":
    sys.exit(main())
