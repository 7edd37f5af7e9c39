"""Benchmarks of sparsejax against itself and others. `python scripts/bench.py serve --help` says more."""

from __future__ import annotations

import argparse
import sys

from benchmarks import blocks, bounds, decode, http_overhead, overload, prefix, serve, start, steps, streaming, tiers

COMMANDS = {
    "http": http_overhead,
    "overload": overload,
    "serve": serve,
    "steps": steps,
    "start": start,
    "decode": decode,
    "bounds": bounds,
    "prefix": prefix,
    "blocks": blocks,
    "tiers": tiers,
    "streaming": streaming,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
