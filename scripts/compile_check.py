"""Lowers every kernel with plain jaxlib, compiles it for devices that are not there, and writes the tables.

    python scripts/compile_check.py                      # all platforms whose compiler is installed
    python scripts/compile_check.py --only lower         # needs no compiler
    python scripts/compile_check.py --platform cuda --match "decode.*D128"

Exits with 1 if anything failed to lower or compile, spills registers or exceeds a limit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pallas_kernels.aot import report, sweep  # noqa: E402
from pallas_kernels.aot.cases import cases, sample  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE, SUMMARY = DOCS / "kernels_compiled.md", DOCS / "kernels.md"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    wanted = [c for c in (sample() if options.sample else cases()) if re.search(options.match, str(c))]
    by_op = {op: list(group) for op, group in itertools.groupby(wanted, lambda c: c.op)}
    problems: list[str] = []
    for platform in options.platform:
        target = sweep.target(platform)
        if options.only != "compile":
            problems += _show(sweep.lowered(wanted, target), f"lowering for {platform}")
        if options.only == "lower":
            continue
        reason = target.available()
        if reason is not None:
            print(f"not compiled for {platform}: {reason}")
            continue
        devices = [device for device in target.TARGETS if re.search(options.device, device)]
        for device, (op, chosen) in itertools.product(devices, by_op.items()):
            lines, seen = itertools.tee(sweep.compiled(chosen, target, device))
            problems += _show(seen, f"compiling for {device}")
            section = report.table(list(lines))
            print(section)
            _write(options.table, f"{device}: {op}", section)
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


def _write(table: Path, title: str, section: str) -> None:
    """Puts the lines of an op into the table, as soon as it is through, and their sum into the page of kernels."""
    table.parent.mkdir(parents=True, exist_ok=True)
    before = table.read_text() if table.exists() else ""
    table.write_text(report.merged(before, {title: section}))
    if table == TABLE:
        SUMMARY.write_text(report.placed(SUMMARY.read_text(), report.summary(table.read_text())))


def _show(lines, title: str) -> list[str]:
    problems = []
    for line in lines:
        found = line.problems()
        problems += found
        outcome = f"declined ({line.declined})" if line.declined else "FAILED" if found else "ok"
        print(f"{title}: {line.case}: {outcome}", flush=True)
    return problems


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", nargs="+", choices=sweep.PLATFORMS, default=list(sweep.PLATFORMS))
    parser.add_argument("--only", choices=("lower", "compile"), help="one of the two stages")
    parser.add_argument("--match", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--device", default="", help="regular expression that a device's name must contain")
    parser.add_argument("--sample", action="store_true", help="a few cases that cover every value of every axis")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the lines go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
