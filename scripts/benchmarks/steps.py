"""Where the time of the serving workload goes: one line per step program, and the host's share."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import random_model
from benchmarks.report import markdown
from benchmarks.serve import ROOT, SIZES

HEADER = (
    "step",
    "calls",
    "tokens",
    "seconds",
    "share",
    "ms median",
    "ms min",
    "CPU ms",
    "CPU us per token",
    "send ms",
)


@dataclass(frozen=True)
class Step:
    """One step: seconds to build and send its inputs, seconds until its results are there, CPU seconds of
    both, useful tokens.
    """

    kind: str
    send: float
    wait: float
    cpu: float
    tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="bfloat16", choices=random_model.DTYPES)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--reps", type=int, default=2, metavar="N", help="timed rounds (default: 2)")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="EngineConfig fields")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/bench", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from sparsejax import Engine

    shape, load = SIZES[args.size]
    model = random_model.write(shape, args.dtype, args.cache)
    settings = {"max_model_len": load.prompt[1] + load.new[1], "max_num_seqs": load.requests}
    settings = {**settings, "enable_prefix_caching": False, **args.engine}  # the same requests come twice
    with Engine(str(model), dtype=args.dtype, **settings) as engine:
        serve(engine, load.make(-1))
        overlapped = [serve(engine, load.make(i)) for i in range(args.reps)]
        steps: list[Step] = []
        engine.core.runner.dispatch = watched(engine.core.runner.dispatch, steps)
        waited = [serve(engine, load.make(i)) for i in range(args.reps)]
    print(text(steps, overlapped, waited, args.reps))
    return 0


def serve(engine: Any, requests: list) -> float:
    """Seconds to serve the requests."""
    from sparsejax import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        for _, new in requests
    ]
    started = time.perf_counter()
    engine.generate([{"prompt_token_ids": prompt} for prompt, _ in requests], params, use_tqdm=False)
    return time.perf_counter() - started


def watched(dispatch: Any, steps: list[Step]) -> Any:
    """``Runner.dispatch`` that waits for each step, so that host and device no longer overlap."""
    import jax

    def timed(plan: Any, greedy: bool, prompt_logprobs: bool) -> Any:
        started, cpu = time.perf_counter(), time.process_time()
        outputs = dispatch(plan, greedy, prompt_logprobs)
        sent = time.perf_counter()
        jax.block_until_ready(outputs)
        done = time.perf_counter()
        if plan.chunks:
            kind = f"mixed, {len(plan.chunks)} chunks" if len(plan.chunks) < 3 else "mixed, 3 or more chunks"
        else:
            kind = f"decode x {plan.num_steps}"
        steps.append(Step(kind, sent - started, done - sent, time.process_time() - cpu, plan.num_tokens))
        return outputs

    return timed


def text(steps: list[Step], overlapped: list[float], waited: list[float], reps: int) -> str:
    """The table. Minima and CPU time stand beside medians because other processes may share the machine."""
    kinds: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        kinds[step.kind].append(step)
    rows = [HEADER]
    device = sum(step.send + step.wait for step in steps)
    for kind, group in sorted(kinds.items()):
        each = [1e3 * (step.send + step.wait) for step in group]
        tokens = sum(step.tokens for step in group)
        rows.append(
            (
                kind,
                f"{len(group) / reps:.0f}",
                f"{tokens / reps:.0f}",
                f"{sum(each) / 1e3 / reps:.2f}",
                f"{sum(each) / 1e3 / device:.0%}",
                f"{statistics.median(each):.1f}",
                f"{min(each):.1f}",
                f"{1e3 * statistics.median(step.cpu for step in group):.1f}",
                f"{1e6 * sum(step.cpu for step in group) / tokens:.0f}",
                f"{1e3 * statistics.median(step.send for step in group):.2f}",
            )
        )
    total = statistics.median(waited)
    return "\n".join(
        [
            markdown(rows),
            "",
            f"One round: {statistics.median(overlapped):.2f} s overlapped, {total:.2f} s when each step is "
            f"waited for, {device / reps:.2f} s of that in steps, {total - device / reps:.3f} s on the host.",
        ]
    )
