"""Compares sparsejax with transformers live, on the tiny checkpoints of the tests.

The peer runs as a subprocess with its own interpreter (torch and transformers, no JAX); with ``--seed`` the
weights and prompts differ from those of the committed answers. Exits with 1 if any case differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sparsejax.models.loader import load_model  # noqa: E402
from tests.models import golden  # noqa: E402


def compare(record: golden.Golden, folder: Path) -> tuple[bool, str]:
    """Whether a record holds for our model, and a line that says how well."""
    model = load_model(golden.write_model(record, folder / record.case), dtype="float32")
    tokens, logprobs = golden.teacher_forced(model, record)
    wrong = int((tokens != np.array(record.tokens)).sum())
    error = float(np.abs(logprobs - np.array(record.logprobs)).max())
    line = f"{tokens.size - wrong}/{tokens.size} tokens equal, largest logprob difference {error:.1e}"
    return wrong == 0 and error <= golden.TOLERANCE, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="interpreter with torch and transformers")
    parser.add_argument("--seed", type=int, default=0, help="added to every case's seed")
    parser.add_argument("cases", nargs="*", help="case names (default: all)")
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "golden"
        script = ROOT / "scripts" / "make_golden.py"
        command = [args.python, str(script), "--out", str(out), "--seed", str(args.seed), *args.cases]
        peer = subprocess.run(command, check=False)
        if peer.returncode:
            print(f"the peer failed with exit status {peer.returncode}: {' '.join(command)}", file=sys.stderr)
            return 2
        for name in args.cases or golden.names():
            record = golden.load(name, out)
            same, line = compare(record, Path(folder))
            if args.seed == 0 and record != golden.load(name):
                line += " (its committed answers differ from these)"
            print(f"{'ok  ' if same else 'FAIL'} {name}: {line}", flush=True)
            if not same:
                failed.append(name)
    print(
        f"{len(failed)} cases differ: {', '.join(failed)}"
        if failed
        else "every case agrees with transformers"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
