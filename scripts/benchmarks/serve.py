"""The serving workload on sparsejax and, interleaved with it, on transformers, each in its own process.

A full comparison in both dtypes takes about 25 minutes on two quiet cores; --minutes sets another limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import random_model, report, workload
from benchmarks.process import Contender
from benchmarks.rounds import Clock, one_repetition, progress
from benchmarks.store import head, save

ROOT = Path(__file__).resolve().parents[2]
PEER_MODES = ("one_by_one", "static", "sorted", "continuous")
SIZES = {
    "full": (random_model.M124, workload.FULL),
    "smoke": (random_model.M124, workload.SMOKE),
    "tiny": (random_model.TINY, workload.TINY),
}
# Prompts of every length and as many decode steps as touch every program: what runs once only (compilation,
# the choice of matrix kernels per shape, growing heaps) is over after that.
WARM_UP_TOKENS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=["transformers"], help="compare with this engine")
    parser.add_argument(
        "--peer-python",
        default=str(ROOT / ".venv-oracle/bin/python"),
        metavar="PATH",
        help="interpreter that has the peer (default: the one `make oracle` builds)",
    )
    parser.add_argument(
        "--peer-modes",
        default=",".join(PEER_MODES),
        metavar="A,B",
        help=f"of {', '.join(PEER_MODES)} (default: all)",
    )
    parser.add_argument("--no-ours", action="store_true", help="run the peer only")
    parser.add_argument("--dtype", default="bfloat16,float32", metavar="A,B", help="(default: both)")
    parser.add_argument(
        "--reps", "--repetitions", type=int, default=5, metavar="N", help="timed rounds (default: 5)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="start no repetition that would end later, shared by the dtypes (default: no limit)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        metavar="N",
        help="cores every contender may use (default: all)",
    )
    parser.add_argument(
        "--size", choices=SIZES, default="full", help="smoke and tiny only check that all works"
    )
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="EngineConfig fields")
    parser.add_argument("--peer-settings", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/bench", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the figures as JSON, after every repetition"
    )


def run(args: argparse.Namespace) -> int:
    modes = args.peer_modes.split(",") if args.peer else []
    if unknown := set(modes) - set(PEER_MODES):
        sys.exit(f"bench: unknown peer mode {', '.join(unknown)}; there are {', '.join(PEER_MODES)}")
    dtypes = args.dtype.split(",")
    if unknown := set(dtypes) - set(random_model.DTYPES):
        sys.exit(f"bench: unknown dtype {', '.join(unknown)}; there are {', '.join(random_model.DTYPES)}")
    if args.peer and not Path(args.peer_python).exists():
        sys.exit(f"bench: {args.peer_python} is missing: run `make oracle`, or give --peer-python")
    shape, load = SIZES[args.size]
    results = {
        **head(),
        "threads": args.threads,
        "model": asdict(shape),
        "workload": load.describe(),
        "dtypes": {},
    }
    clock = Clock(args.minutes)
    for index, dtype in enumerate(dtypes):
        clock.share(len(dtypes) - index)
        model = random_model.write(shape, dtype, args.cache)
        compare(args, modes, load, dtype, model, clock, results)
        print(report.serve_table(results, dtype), flush=True)
    return 0


def compare(
    args: argparse.Namespace,
    modes: list[str],
    load: workload.Workload,
    dtype: str,
    model: Path,
    clock: Clock,
    results: dict[str, Any],
) -> None:
    """A short untimed round of every contender, then the repetitions, contenders taking turns within each."""
    with contextlib.ExitStack() as stack:
        contenders = []
        if not args.no_ours:
            contenders.append(stack.enter_context(ours(args, load, dtype, model)))
        contenders += [stack.enter_context(peer(args, mode, load, dtype, model)) for mode in modes]
        for contender in contenders:
            answer = contender.run(load.warm_up(WARM_UP_TOKENS))
            progress(f"{dtype}: {contender.name} is warm after {answer['seconds']:.1f} s")
        entry = results["dtypes"][dtype] = {
            "versions": {name: v for c in contenders for name, v in c.loaded["versions"].items()},
            "load": {c.name: {k: round(c.loaded[k], 2) for k in ("seconds", "peak_mib")} for c in contenders},
            "settings": {c.name: c.loaded["settings"] for c in contenders},
            "runs": [],
        }
        for repetition in range(args.reps):
            if not clock.has_time(repetition):
                progress(f"{dtype}: stopped after {repetition} repetitions, time is up")
                break
            with clock.repetition():
                entry["runs"] += one_repetition(contenders, load, repetition, dtype)
            left = args.reps - repetition - 1
            progress(f"{dtype}: repetition {repetition + 1} of {args.reps}; {clock.outlook(left)}")
            save(args.out, results)


def ours(args: argparse.Namespace, load: workload.Workload, dtype: str, model: Path) -> Contender:
    engine = {"max_model_len": load.prompt[1] + load.new[1], "max_num_seqs": load.requests, "warmup": "full"}
    engine |= args.engine
    settings = {"model": str(model), "dtype": dtype, "threads": args.threads, "engine": engine}
    return Contender("sparsejax", sys.executable, "sparsejax_side.py", settings, root=ROOT)


def peer(args: argparse.Namespace, mode: str, load: workload.Workload, dtype: str, model: Path) -> Contender:
    described = load.describe()
    settings = {
        "model": str(model),
        "dtype": dtype,
        "threads": args.threads,
        "mode": mode,
        "pool_tokens": described["prompt_tokens"] + described["new_tokens"],
        "max_requests": load.requests,
        **args.peer_settings,
    }
    return Contender(f"transformers {mode}", args.peer_python, "transformers_peer.py", settings)
