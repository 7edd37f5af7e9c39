"""What the prefix cache saves: waits for the first token and computed tokens, with it and without, and from each tier.

Where the pool is small it holds one request, and before each request a neighbour with a prompt of its own fills it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.report import markdown
from benchmarks.store import head

SESSIONS = ("shared system prompt", "document with questions", "chat of many turns")
SMALL = "small pool"
HEADER = (
    *("workload", "cache", "requests", "prompt tokens", "computed tokens", "hits", "first token, ms (min to max)"),
    *("of a miss", "MB on device, in memory, on disk: before", "after"),
)


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
    results = {**head(), "settings": {name: getattr(args, name) for name in ("shared", "own", "new", "users")}}
    results["workloads"] = {}
    with ExitStack() as stack:
        engines = make_engines(args, stack)
        for name in SESSIONS:
            runs = [serve(engine, name, args, mode.startswith(SMALL)) for mode, engine in engines.items()]
            for found in zip(*runs, strict=True):  # a request each, in turns
                results["workloads"][name] = dict(zip(engines, found, strict=True))
        results["together"] = together(engines["on"], args)
    print(table(results))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def make_engines(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """An engine for each mode, whose programs are compiled."""
    from sparsejax import Engine, SamplingParams

    longest = args.shared + args.requests * (args.own + args.new)
    settings = {"warmup": "lazy", "max_model_len": longest, **args.engine}
    with Engine(args.model, **{**settings, "warmup": "none"}) as engine:
        group, page = engine.core.runner.state.kv.group, engine.config.page_size
    pool = group.fixed_bytes + (longest // page + 3) * group.page_bytes
    small, large = {"kv_memory_bytes": pool}, {"kv_memory_bytes": 8 * pool}
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    modes = {
        "on": large,
        "off": large | {"enable_prefix_caching": False},
        SMALL: small,
        f"{SMALL}, main memory": small | {"host_kv_bytes": 64 * pool},
        f"{SMALL}, disk": small | {"disk_kv_path": folder, "disk_kv_bytes": 64 * pool},
    }
    engines = {mode: stack.enter_context(Engine(args.model, **settings, **its)) for mode, its in modes.items()}
    params = SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    for engine in engines.values():
        for known in range(2):
            engine.generate({"prompt_token_ids": [*[1] * args.shared, *[known] * args.own]}, params)
    return engines


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


def serve(engine: Any, name: str, args: argparse.Namespace, crowded: bool) -> Iterator[dict[str, Any]]:
    """What was measured so far, after each request; the first finds nothing in any cache. Where it is `crowded` each
    comes after a neighbour, who is not counted."""
    from sparsejax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    vocabulary, draw = engine.core.runner.vocab_size, random.Random(f"neighbours of {name}")
    held, counts, waits = tier_bytes(engine), Counter(), []
    for parts in sessions(name, args, vocabulary):
        prompt: list[int] = []
        for part in parts:
            if crowded:
                theirs = [draw.randrange(vocabulary) for _ in range(args.shared)]
                engine.generate({"prompt_token_ids": theirs}, params)
            before = engine.stats()
            prompt, started, first = prompt + part, time.perf_counter(), None
            for delta in engine.stream({"prompt_token_ids": prompt}, params):
                first = first or time.perf_counter() - started
                prompt = prompt + delta.outputs[0].token_ids
            waits.append(first)
            counts.update(grown(before, engine.stats()))
            yield {"first_token_s": waits, **counts, "tier_bytes": [held, tier_bytes(engine)]}


def tier_bytes(engine: Any) -> dict[str, int]:
    """Bytes of pages in use by tier, those that are only cached included."""
    stats = engine.stats()
    device = (stats["kv_live_pages"] + stats["kv_idle_pages"]) * stats["kv_page_bytes"]
    return {"device": device, **{tier: stats.get(f"{tier}_kv_live_bytes", 0) for tier in ("host", "disk")}}


def together(engine: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Many users at once, whose shared tokens nobody has asked for before."""
    from sparsejax import SamplingParams

    draw, vocabulary = random.Random("together"), engine.core.runner.vocab_size
    params = SamplingParams(temperature=0.0, max_tokens=args.new, ignore_eos=True, detokenize=False)
    shared = [draw.randrange(vocabulary) for _ in range(args.shared)]
    held, before, started, most = tier_bytes(engine), engine.stats(), time.perf_counter(), 0
    for user in range(args.users):
        own = [draw.randrange(vocabulary) for _ in range(args.own)]
        engine.add_request(f"user-{user}", {"prompt_token_ids": shared + own}, params)
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.stats()["kv_live_pages"])
    return {
        "seconds": time.perf_counter() - started,
        "most_live_pages": most,
        "tier_bytes": [held, tier_bytes(engine)],
        "pages_of_the_prefix": args.shared // engine.config.page_size,
        **grown(before, engine.stats()),
    }


def grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in ("prompt_tokens", "computed_tokens", "prefix_cache_hits")}


def table(results: dict[str, Any]) -> str:
    """Waits of the first request, which finds nothing, and of those after it."""
    rows = [HEADER]
    for name, by_cache in results["workloads"].items():
        misses = by_cache["off"]["first_token_s"]
        for cache, one in by_cache.items():
            waits = [1e3 * wait for wait in one["first_token_s"]]
            rest, share = waits[1:], [wait / miss for wait, miss in zip(one["first_token_s"], misses, strict=True)]
            held = ("/".join(f"{tiers[tier] / 1e6:.1f}" for tier in tiers) for tiers in one["tier_bytes"])
            rows.append(
                (
                    name,
                    cache,
                    str(len(waits)),
                    str(one["prompt_tokens"]),
                    str(one["computed_tokens"]),
                    f"{one['prefix_cache_hits'] / one['prompt_tokens']:.0%}",
                    f"first {waits[0]:.0f}, then {statistics.median(rest):.0f} ({min(rest):.0f} to {max(rest):.0f})",
                    f"{statistics.median(share[1:]):.0%}",
                    *held,
                )
            )
    many, settings = results["together"], results["settings"]
    grew = (many["tier_bytes"][1]["device"] - many["tier_bytes"][0]["device"]) / 1e6
    return (
        f"{results['machine']['cpu']}, {results['machine']['cores']} cores; {settings['shared']} shared tokens, "
        f"{settings['own']} of each request, {settings['new']} generated.\n\n{markdown(rows)}\n\n"
        f"{settings['users']} users at once: {many['prompt_tokens']} prompt tokens, {many['computed_tokens']} tokens "
        f"computed, {many['prefix_cache_hits']} read from the cache; at most {many['most_live_pages']} pages were in "
        f"use, {many['pages_of_the_prefix']} of them the prefix; what is cached grew by {grew:.1f} MB.\n"
    )
