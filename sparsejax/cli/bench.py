"""Measure a model on this machine: synthetic prompts served together, the first round untimed.

sparsejax bench --num-prompts 16 --input-len 512 --output-len 128

With "serve", requests go to a running server at random times, at a rate that does not wait for answers:

sparsejax bench serve --url http://127.0.0.1:8000 --rate 4 --num-prompts 100 --plot latency.png
sparsejax bench serve --url grpc://127.0.0.1:50051 --rate 4 --slo-first-token-ms 500
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from sparsejax.cli import load, options, show
from sparsejax.errors import RequestError


@dataclass(frozen=True)
class Round:
    """One timed round: seconds in all, generated tokens per second, and seconds to the first tokens."""

    seconds: float
    new_tokens_per_s: float
    first_token_s: float
    last_first_token_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=("engine", "serve"), default="engine", metavar="serve")
    group = parser.add_argument_group("workload")
    group.add_argument("--num-prompts", type=int, default=8, metavar="N", help="requests per round (default: 8)")
    group.add_argument("--input-len", type=int, default=128, metavar="N", help="prompt tokens (default: 128)")
    group.add_argument("--output-len", type=int, default=64, metavar="N", help="new tokens (default: 64)")
    group.add_argument("--rounds", type=int, default=3, metavar="N", help="timed rounds (default: 3)")
    group.add_argument("--json", action="store_true", help="print the figures as JSON")
    load.add_arguments(parser)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    for name in ("num_prompts", "input_len", "output_len", "rounds"):
        if getattr(args, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1.", parameter=name)
    if args.what == "serve":
        return load.run(args)
    with options.make_engine(args) as engine:
        vocabulary = engine.core.runner.vocab_size
        serve(engine, workload(args, vocabulary, 0), args.output_len)
        rounds = [serve(engine, workload(args, vocabulary, i), args.output_len) for i in range(1, args.rounds + 1)]
        live = engine.memory()
    print(as_json(rounds, live) if args.json else as_text(args, rounds, live))
    return 0


def workload(args: argparse.Namespace, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    """Random prompts of one length; a new seed per round keeps any prefix sharing out of the figures."""
    draw = random.Random(seed)
    return [
        {"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(args.input_len)]}
        for _ in range(args.num_prompts)
    ]


def serve(engine: Any, prompts: list[dict[str, list[int]]], new_tokens: int) -> Round:
    """Add every request, step until all are done, and time the first token of each."""
    from sparsejax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"bench-{index}", prompt, params)
    first: dict[str, float] = {}
    while engine.has_unfinished():
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return Round(seconds, len(prompts) * new_tokens / seconds, min(first.values()), max(first.values()))


def middle(rounds: list[Round]) -> dict[str, float]:
    return {name: statistics.median(asdict(r)[name] for r in rounds) for name in asdict(rounds[0])}


def as_json(rounds: list[Round], memory: dict[str, int]) -> str:
    return json.dumps({"median": middle(rounds), "rounds": [asdict(r) for r in rounds], "memory": memory}, indent=2)


def as_text(args: argparse.Namespace, rounds: list[Round], memory: dict[str, int]) -> str:
    """A few lines: the workload, the medians with their spread, and the memory."""
    mid, rates = middle(rounds), [r.new_tokens_per_s for r in rounds]
    total = args.num_prompts * (args.input_len + args.output_len) / mid["seconds"]
    spread = f"{min(rates):.1f} to {max(rates):.1f} in {len(rounds)} rounds"
    first, last = mid["first_token_s"], mid["last_first_token_s"]
    rows = [
        ("new tokens/s", f"{mid['new_tokens_per_s']:.1f} ({spread})"),
        ("all tokens/s", f"{total:.1f}"),
        ("first token", f"{first:.3f} s for the first request, {last:.3f} s for the last"),
        ("memory", ", ".join(f"{name} {show.size(count)}" for name, count in memory.items())),
    ]
    title = f"{args.num_prompts} requests, {args.input_len} prompt and {args.output_len} new tokens each"
    return f"{title}\n{show.table(rows)}"
