"""`bench.py serve`: the serving workload on sparsejax and, interleaved with it, on transformers."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import random_model, report, workload
from benchmarks.machine import describe_machine
from benchmarks.process import Contender

ROOT = Path(__file__).resolve().parents[2]
PEER_MODES = ("one_by_one", "static", "sorted", "continuous")
SIZES = {
    "full": (random_model.M124, workload.FULL),
    "tiny": (random_model.TINY, workload.TINY),
}


@dataclass(frozen=True)
class Run:
    """One timed round of one contender. ``foreign_cpu`` is the share of the processors that others used."""

    contender: str
    repetition: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    foreign_cpu: float | None
    load_average: float
    new_tokens: int
    same_tokens: int | None  # requests with the tokens of the first contender, of this repetition


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
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="cores every contender may use (default: all)",
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny only checks that all works")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="EngineConfig fields")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/bench", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    modes = args.peer_modes.split(",") if args.peer else []
    if unknown := set(modes) - set(PEER_MODES):
        sys.exit(f"bench: unknown peer mode {', '.join(unknown)}; there are {', '.join(PEER_MODES)}")
    if args.peer and not Path(args.peer_python).exists():
        sys.exit(f"bench: {args.peer_python} is missing: run `make oracle`, or give --peer-python")
    shape, load = SIZES[args.size]
    results = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": describe_machine(),
        "threads": args.threads,
        "model": asdict(shape),
        "workload": load.describe(),
        "dtypes": {},
    }
    for dtype in args.dtype.split(","):
        model = random_model.write(shape, dtype, args.cache)
        results["dtypes"][dtype] = compare(args, modes, load, dtype, model)
        print(report.serve_table(results, dtype), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def compare(
    args: argparse.Namespace, modes: list[str], load: workload.Workload, dtype: str, model: Path
) -> dict:
    """One untimed round of every contender, then the repetitions, contenders taking turns within each."""
    runs: list[Run] = []
    with contextlib.ExitStack() as stack:
        contenders = []
        if not args.no_ours:
            contenders.append(stack.enter_context(ours(args, dtype, model)))
        contenders += [stack.enter_context(peer(args, mode, load, dtype, model)) for mode in modes]
        for contender in contenders:
            progress(f"{dtype}: warming up {contender.name}")
            contender.run(load.make(-1))
        for repetition in range(args.repetitions):
            runs += one_repetition(contenders, load, repetition, dtype)
        versions = {name: v for c in contenders for name, v in c.loaded["versions"].items()}
        loaded = {c.name: {k: c.loaded[k] for k in ("seconds", "peak_mib")} for c in contenders}
    return {"versions": versions, "load": loaded, "runs": [asdict(run) for run in runs]}


def one_repetition(
    contenders: list[Contender], load: workload.Workload, repetition: int, dtype: str
) -> list[Run]:
    """Every contender serves the same requests once; the order rotates so that none is always first."""
    requests = load.make(repetition)
    first = repetition % len(contenders)
    answers = {}
    for contender in contenders[first:] + contenders[:first]:
        answers[contender.name] = answer = contender.run(requests)
        given = [len(tokens) for tokens in answer["tokens"]]
        if given != [new for _, new in requests]:
            sys.exit(f"bench: {contender.name} did not generate what was asked: {given}")
        progress(f"{dtype} {repetition}: {contender.name} {answer['seconds']:.2f} s")
    tokens = {name: answer.pop("tokens") for name, answer in answers.items()}
    reference = tokens[contenders[0].name]
    return [
        Run(
            contender=name,
            repetition=repetition,
            new_tokens=sum(new for _, new in requests),
            same_tokens=sum(a == b for a, b in zip(tokens[name], reference, strict=True)),
            **{k: round(v, 4) if v is not None else None for k, v in answer.items()},
        )
        for name, answer in answers.items()
    ]


def ours(args: argparse.Namespace, dtype: str, model: Path) -> Contender:
    settings = {"model": str(model), "dtype": dtype, "threads": args.threads, "engine": args.engine}
    return Contender("sparsejax", sys.executable, "sparsejax_side.py", settings, cwd=ROOT)


def peer(args: argparse.Namespace, mode: str, load: workload.Workload, dtype: str, model: Path) -> Contender:
    described = load.describe()
    settings: dict[str, Any] = {
        "model": str(model),
        "dtype": dtype,
        "threads": args.threads,
        "mode": mode,
        "pool_tokens": described["prompt_tokens"] + described["new_tokens"],
        "max_requests": load.requests,
    }
    return Contender(f"transformers {mode}", args.peer_python, "transformers_peer.py", settings)


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
