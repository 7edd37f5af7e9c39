"""What the prefix cache saves: waits for the first token and computed tokens, with it and without."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import markdown
from benchmarks.store import head

SESSIONS = ("shared system prompt", "document with questions", "chat of many turns")
HEADER = ("workload", "cache", "requests", "prompt tokens", "computed tokens", "hits", "first token, ms (min to max)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint; default: the model inside the package")
    parser.add_argument("--shared", type=int, default=4096, metavar="N", help="shared tokens (default: 4096)")
    parser.add_argument("--own", type=int, default=32, metavar="N", help="tokens of each request (default: 32)")
    parser.add_argument("--new", type=int, default=16, metavar="N", help="generated tokens (default: 16)")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="of each workload (default: 8)")
    parser.add_argument("--users", type=int, default=100, metavar="N", help="that come at once (default: 100)")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="EngineConfig fields")
    parser.add_argument("--out", type=Path, help="write the results here")


def run(args: argparse.Namespace) -> int:
    from sparsejax import Engine

    longest = args.shared + args.requests * (args.own + args.new)
    settings = {"warmup": "lazy", "max_model_len": longest, **args.engine}
    results = {**head(), "settings": {name: getattr(args, name) for name in ("shared", "own", "new", "users")}}
    results["workloads"] = {name: {} for name in SESSIONS}
    for cache in (True, False):
        with Engine(args.model, enable_prefix_caching=cache, **settings) as engine:
            for name in SESSIONS:
                results["workloads"][name]["on" if cache else "off"] = serve(engine, name, args)
            if cache:
                results["together"] = together(engine, args)
    print(table(results))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def sessions(name: str, args: argparse.Namespace, vocabulary: int) -> Iterator[list[list[int]]]:
    """Requests that follow one another: the tokens that each adds to the answered ones before it."""
    draw = random.Random(f"{name}-{args.shared}")

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(count)]

    shared = tokens(args.shared)
    if name == "chat of many turns":
        yield [shared + tokens(args.own), *(tokens(args.own) for _ in range(args.requests - 1))]
    else:
        yield from ([shared + tokens(args.own)] for _ in range(args.requests))


def serve(engine: Any, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One request after the other; the first finds nothing in any cache."""
    from sparsejax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    before, waits = engine.stats(), []
    for parts in sessions(name, args, engine.core.runner.vocab_size):
        prompt: list[int] = []
        for part in parts:
            prompt, started, first = prompt + part, time.perf_counter(), None
            for delta in engine.stream({"prompt_token_ids": prompt}, params):
                first = first or time.perf_counter() - started
                prompt = prompt + delta.outputs[0].token_ids
            waits.append(first)
    return {"first_token_s": waits, **grown(before, engine.stats())}


def together(engine: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Many users at once, whose shared tokens nobody has asked for before."""
    from sparsejax import SamplingParams

    draw, vocabulary = random.Random("together"), engine.core.runner.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    shared = [draw.randrange(vocabulary) for _ in range(args.shared)]
    before, started, most = engine.stats(), time.perf_counter(), 0
    for user in range(args.users):
        own = [draw.randrange(vocabulary) for _ in range(args.own)]
        engine.add_request(f"user-{user}", {"prompt_token_ids": shared + own}, params)
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.stats()["kv_live_pages"])
    return {
        "seconds": time.perf_counter() - started,
        "most_live_pages": most,
        "pages_of_the_prefix": args.shared // engine.config.page_size,
        **grown(before, engine.stats()),
    }


def grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in ("prompt_tokens", "computed_tokens", "prefix_cache_hits")}


def table(results: dict[str, Any]) -> str:
    """Waits of the first request, which finds nothing, and of those after it."""
    rows = [HEADER]
    for name, by_cache in results["workloads"].items():
        for cache, one in by_cache.items():
            waits = [1e3 * wait for wait in one["first_token_s"]]
            rest = waits[1:] if cache == "on" else waits
            rows.append(
                (
                    name,
                    cache,
                    str(len(waits)),
                    str(one["prompt_tokens"]),
                    str(one["computed_tokens"]),
                    f"{one['prefix_cache_hits'] / one['prompt_tokens']:.0%}",
                    (f"first {waits[0]:.0f}, then " if cache == "on" else "")
                    + f"{statistics.median(rest):.0f} ({min(rest):.0f} to {max(rest):.0f})",
                )
            )
    many, settings = results["together"], results["settings"]
    return (
        f"{results['machine']['cpu']}, {results['machine']['cores']} cores; {settings['shared']} shared tokens, "
        f"{settings['own']} of each request, {settings['new']} generated.\n\n{markdown(rows)}\n\n"
        f"{settings['users']} users at once: {many['prompt_tokens']} prompt tokens, {many['computed_tokens']} tokens "
        f"computed, {many['prefix_cache_hits']} read from the cache; at most {many['most_live_pages']} pages were in "
        f"use, {many['pages_of_the_prefix']} of them the prefix.\n"
    )
