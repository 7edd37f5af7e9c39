"""Check this machine: versions, devices, kernels, caches and a model, and say how to fix what is missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator

from sparsejax.cli import checks, options
from sparsejax.cli.checks import Check
from sparsejax.errors import SparseJaxError

MARKS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checks")
    group.add_argument("--check-nan", action="store_true", help="read every weight and report NaN and infinity")
    group.add_argument("--no-model", action="store_true", help="do not load a model")
    group.add_argument("--json", action="store_true", help="print the checks as JSON")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print each check as it is done. Returns 1 when one failed, else 0."""
    results = []
    for check in every_check(args):
        results.append(check)
        if not args.json:
            print(f"{MARKS[check.status]}  {check.name:<14} {check.detail}", flush=True)
            if check.fix:
                print(f"      {'':<14} -> {check.fix}", flush=True)
    failed = [check.name for check in results if check.status == "fail"]
    if args.json:
        print(json.dumps({"ok": not failed, "checks": [vars(check) for check in results]}, indent=2))
    else:
        print(f"\n{len(failed)} failed: {', '.join(failed)}" if failed else "\nEverything needed works here.")
    return 1 if failed else 0


def every_check(args: argparse.Namespace) -> Iterator[Check]:
    """Runs the checks in order; those that need JAX come after the check that it imports."""
    yield checks.python()
    yield from checks.packages()
    yield from checks.extras()
    yield checks.processor()
    yield checks.memory()
    devices = guarded("devices", checks.devices)
    yield devices
    if devices.status == "fail":
        return
    yield from checks.operations()
    try:
        config = options.make_config(args)
    except SparseJaxError as error:
        yield Check("settings", "fail", str(error))
        return
    yield guarded("compile cache", lambda: checks.compile_cache(config))
    yield guarded("page tiers", lambda: checks.page_tiers(config))
    if not args.no_model:
        loaded = guarded("model", lambda: checks.model(config, args.check_nan))
        yield loaded
        if loaded.status != "fail":
            yield guarded("tokenizer", lambda: checks.tokenizer(config))


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """An expected failure of the thing under test becomes a failed check; a bug keeps its traceback."""
    try:
        return check()
    except (SparseJaxError, ImportError, OSError, RuntimeError, ValueError) as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}")
