"""Writes the benchmark tables of README.md (or another file) from stored JSON, between its markers.

A marker pair is ``<!-- bench:NAME.json DTYPE -->`` and ``<!-- /bench -->``; NAME.json lies in docs/results.
`--check` changes nothing and fails where a table differs from its results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.report import serve_table

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- bench:(\S+) (\w+) -->\n).*?(<!-- /bench -->)", re.S)


def rewrite(text: str, results: Path) -> str:
    """The text with every marked table made anew."""

    def table(match: re.Match) -> str:
        stored = json.loads((results / match[2]).read_text())
        return f"{match[1]}{serve_table(stored, match[3])}{match[4]}"

    return MARKED.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / "README.md"])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for path in args.files:
        old = path.read_text()
        new = rewrite(old, ROOT / "docs/results")
        if new != old:
            stale.append(str(path))
            if not args.check:
                path.write_text(new)
    if args.check and stale:
        print(f"stale benchmark tables in {', '.join(stale)}: run scripts/bench_report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
