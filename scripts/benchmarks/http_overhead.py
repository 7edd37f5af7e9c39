"""What the HTTP server costs: the same requests offline, over HTTP, and streamed over HTTP.

One engine object for the offline runs and one behind the server, both of the model inside the package, in one
process; the clients are a process of their own on the same cores. The three ways take turns. CPU time is that of the
process with the engines and the server, so it can be compared on a machine that others use too; tokens/s cannot.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

NEW_TOKENS = 96
WAYS = ("offline", "http", "streamed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=64, help="requests of a run (default: 64)")
    parser.add_argument("--clients", type=int, default=32, help="connections at once (default: 32)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each way (default: 5)")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="rows of the engine (default: 16)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")


def bodies(count: int) -> list[dict]:
    """Greedy requests of 30 to 200 prompt tokens that all generate the same number of tokens."""
    rng = random.Random(0)
    words = ["box", "lamp", "apple", "door", "stone"]

    def prompt() -> str:
        return "".join(f" {rng.choice(words)}: {rng.randint(100, 999)};" for _ in range(rng.randint(7, 45)))

    fixed = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return [{"prompt": prompt(), **fixed} for _ in range(count)]


def run(args: argparse.Namespace) -> int:
    from benchmarks.process import Load
    from benchmarks.store import head
    from sparsejax import Engine, EngineConfig, SamplingParams
    from sparsejax.serve.openai.options import HttpOptions
    from sparsejax.serve.openai.server import listen, make_server
    from sparsejax.serve.service import Service

    settings = dict(max_model_len=1024, warmup="lazy", enable_prefix_caching=False)  # every run computes the same
    config = EngineConfig(max_num_seqs=args.max_num_seqs, **settings)
    requests = bodies(args.requests)
    params = [SamplingParams(**{k: v for k, v in body.items() if k != "prompt"}) for body in requests]
    service, options = Service(config), HttpOptions(port=0)
    sock = listen(options)
    server = make_server(service, options)

    async def serve() -> None:
        service.start()
        await server.serve([sock])
        await service.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    asyncio.run(service.loaded())
    port = sock.getsockname()[1]
    client = [sys.executable, __file__, str(port), str(args.clients)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with Engine(config=config) as engine, subprocess.Popen(client, **pipes) as other:

        def offline() -> float:
            start = time.perf_counter()
            engine.generate([body["prompt"] for body in requests], params, use_tqdm=False)
            return time.perf_counter() - start

        def over_http(stream: bool) -> float:
            print(json.dumps([{**body, "stream": stream} for body in requests]), file=other.stdin, flush=True)
            return float(other.stdout.readline())

        ways = {"offline": offline, "http": lambda: over_http(False), "streamed": lambda: over_http(True)}
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(args.repeat + 1):
            for way in WAYS:
                load, before = Load.now(other.pid), time.process_time()
                seconds = ways[way]()
                if turn:  # the first one warms connections and caches
                    used = time.process_time() - before
                    runs[way].append({"seconds": seconds, "cpu_seconds": used, **Load.now(other.pid).since(load)})
        other.stdin.close()
    server.should_exit = True
    thread.join()
    sizes = {"requests": args.requests, "clients": args.clients, "rows": args.max_num_seqs, "new_tokens": NEW_TOKENS}
    stored = {**head(), "workload": sizes, "runs": runs}
    if args.out:
        args.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored))
    return 0


def table(stored: dict[str, Any]) -> str:
    """The stored runs as Markdown: medians, and the cost of each way over the one before any server."""
    from benchmarks.report import markdown

    work, runs = stored["workload"], stored["runs"]
    tokens = work["requests"] * work["new_tokens"]
    rows: list[tuple[str, ...]] = [("", "tokens/s", "CPU ms per token", "CPU over offline, in the single rounds")]
    for way in WAYS:
        rate = tokens / statistics.median(run["seconds"] for run in runs[way])
        used = 1000 * statistics.median(run["cpu_seconds"] for run in runs[way]) / tokens
        pairs = zip(runs[way], runs["offline"], strict=True)
        more = [one["cpu_seconds"] / base["cpu_seconds"] - 1 for one, base in pairs]
        spread = f"{statistics.median(more):+.1%} ({min(more):+.1%} to {max(more):+.1%})" if way != "offline" else ""
        rows.append((way, f"{rate:.0f}", f"{used:.4f}", spread))
    others = statistics.median(run["foreign_cpu"] or 0.0 for way in WAYS for run in runs[way])
    text = (
        f"Medians of {len(runs['offline'])} rounds that take turns: {work['requests']} greedy requests of "
        f"{work['new_tokens']} new tokens over {work['clients']} connections, {work['rows']} rows of the engine; CPU "
        f"time is that of the process with the engine and the server. The clients ran on the same "
        f"{stored['machine']['cores']} cores; others used {others:.0%} of them.\n"
    )
    return f"{markdown(rows)}\n\n{text}"


async def ask(port: int, waiting: list[bytes]) -> None:
    """One connection that sends what waits, one request after the other, and reads the answers to their ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    while waiting:
        body = waiting.pop()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(head.decode())
        if b"chunked" in head:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            size = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(size)
    writer.close()


def main() -> None:
    """The clients' process: a line of requests in, the seconds that they took out."""
    port, clients = int(sys.argv[1]), int(sys.argv[2])

    async def all_of(waiting: list[bytes]) -> None:
        await asyncio.gather(*(ask(port, waiting) for _ in range(clients)))

    for line in sys.stdin:
        waiting = [json.dumps(body).encode() for body in json.loads(line)]
        start = time.perf_counter()
        asyncio.run(all_of(waiting))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
