"""Checks and times every kernel on the GPU of this machine, in one command and under eight minutes.

    python scripts/gpu_suite.py          # needs jax (with CUDA), flax and numpy; torch is a peer if present
    python scripts/gpu_suite.py --tiny   # the same cases, small, on whatever JAX finds

Three stages: every op against float64 on fresh random inputs whose spare pages hold NaN; time and bandwidth of
attention beside XLA gather, cuDNN and torch, and of what scores, chooses, codes and opens pages beside XLA, as a share
of the copy bandwidth of the same run; a decode step at the shapes of Llama-3-8B. A table says which goals
were reached. A case that fails, crashes or hangs is recorded and the others run. Exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from suite import bare, records, report, supervisor  # noqa: E402

# Each stage, and the share of the time after which none of its cases starts, so that the next ones have their turn.
STAGES = {"numerics": 0.5, "attention": 0.9, "decode_step": 1.0}
TOTAL_SECONDS = 6 * 60  # a case in progress may take 20 seconds more, the peer that follows another minute and a half


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    bare.install()
    if options.worker:
        return _work(options)
    return _supervise(options)


def _work(options: argparse.Namespace) -> int:
    """Runs the stages and prints their records."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    import jax
    from suite import attention, clock, decode_step, latents, numerics, scoring

    device = jax.local_devices()[0]
    records.emit(
        {
            "case": "machine",
            "status": "ok",
            "device": device.device_kind,
            "platform": device.platform,
            "compute_capability": str(getattr(device, "compute_capability", "")),
            "jax": jax.__version__,
        }
    )
    stages = {
        "numerics": lambda: numerics.cases(options.seed, options.tiny),
        "attention": lambda: itertools.chain(
            *(stage.cases(options.tiny) for stage in (attention, latents, scoring))
        ),
        "decode_step": lambda: decode_step.cases(options.tiny),
    }
    for stage in options.stages:
        deadline = options.deadline - (1 - STAGES[stage]) * options.seconds
        records.run_cases(stage, stages[stage](), skip=set(options.skip), deadline=deadline, alive=clock.alive)
    return 0


def _supervise(options: argparse.Namespace) -> int:
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4))
    start = time.time()
    deadline = start + options.seconds
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
        command = [sys.executable, __file__, "--worker", "--seed", str(seed), "--deadline", str(deadline)]
        command += ["--seconds", str(options.seconds)]
        command += ["--stages", *options.stages] + ["--tiny"] * options.tiny
        found = supervisor.supervise(command, deadline=deadline, case_seconds=options.case_seconds, show=report.show)
    if "attention" in options.stages:
        found += report.torch_peer(options.tiny)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "took_s": round(time.time() - start, 1),
        "cases": found,
    }
    print(report.table(found), report.goals(found), sep="\n\n")
    path = options.output or report.default_path(found, ROOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    failed = [record["case"] for record in found if record["status"] == "error"]
    print(f"{len(found)} cases, {len(failed)} failed, {result['took_s']} s; seed {seed}; written to {path}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small cases that run on a CPU")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--seed", type=int, help="seed of the inputs; a new one if not given")
    parser.add_argument("--output", type=Path, help="JSON file; docs/results/gpu_suite_<device>.json if not given")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="no case starts after so long")
    parser.add_argument("--case-seconds", type=float, default=90.0, help="a case silent for so long is killed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)
    parser.add_argument("--skip", nargs="*", default=[], help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
