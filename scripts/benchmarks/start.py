"""Cold start: a new process to its first token, with an empty compile cache and with a warm one."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import random_model
from benchmarks.report import markdown
from benchmarks.serve import ROOT
from benchmarks.store import head

STAGES = ("interpreter", "import", "ready", "first_token")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="checkpoint (default: the one inside the package)")
    parser.add_argument("--random", action="store_true", help="a tiny random checkpoint instead")
    parser.add_argument("--reps", type=int, default=5, metavar="N", help="warm starts (default: 5)")
    parser.add_argument(
        "--limit", type=float, metavar="S", help="fail where a warm start takes longer than this (seconds)"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/bench", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    model = args.model
    if args.random:
        model = str(random_model.write(random_model.TINY, "float32", args.cache))
    with tempfile.TemporaryDirectory() as cache:
        cold = start_once(model, cache)
        warm = [start_once(model, cache) for _ in range(args.reps)]
    results = {
        **head(),
        "model": "random" if args.random else args.model or "embedded",
        "cold": cold,
        "warm": warm,
    }
    print(table(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    middle = statistics.median(one["first_token"] for one in warm)
    if args.limit is not None and middle > args.limit:
        print(f"a warm start takes {middle:.1f} s, more than {args.limit:.1f} s", file=sys.stderr)
        return 1
    return 0


def start_once(model: str | None, cache: str) -> dict[str, Any]:
    """Seconds from before the process existed to each stage, and the share of the processors in use."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    settings = json.dumps({"model": model, "cache": cache})
    script = str(Path(__file__).with_name("first_token.py"))
    started = time.time()
    done = subprocess.run(
        [sys.executable, script, settings], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"bench: the engine did not start\n{done.stderr[-3000:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    stages = {name: round(when - started, 3) for name, when in answer["stages"].items()}
    return {**stages, "compiles": answer["compiles"], "load_average": os.getloadavg()[0]}


def table(results: dict[str, Any]) -> str:
    """Seconds since the start of the process, cold beside warm."""
    rows = [("seconds until", "empty compile cache", "warm, median (min to max)")]
    for name in STAGES:
        warm = [one[name] for one in results["warm"]]
        spread = f"{statistics.median(warm):.2f} ({min(warm):.2f} to {max(warm):.2f})" if warm else ""
        rows.append((name.replace("_", " "), f"{results['cold'][name]:.2f}", spread))
    return markdown(rows)
