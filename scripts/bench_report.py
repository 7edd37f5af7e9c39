"""Writes the benchmark tables and pictures of README.md (or other files) from stored JSON, between markers.

A marker pair is ``<!-- KIND:NAME.json DTYPE -->`` and ``<!-- /bench -->``; NAME.json lies in docs/results. Kinds are
the tables ``bench``, ``decode``, ``gains`` (of a dtype), ``bounds``, ``blocks``, ``overload``, ``http``, ``tiers``,
``streaming``, ``prefix``, ``ablation``, ``layers`` and those of `benchmarks.evaluation.TABLES` (of several
``NAME.json,NAME.json``), the sentence ``soak``, and ``chart``, the picture NAME.svg. What was not measured yet says so.
`--check` changes nothing and fails where a file differs from its results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks import ablation, blocks, bounds, http_overhead, overload, prefix, soak_report, streaming, tiers
from benchmarks.chart import caption, serve_chart
from benchmarks.decode_report import decode_table, gains_table
from benchmarks.evaluation import TABLES
from benchmarks.report import serve_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("docs/results")
PAGES = (
    *("README.md", "docs/benchmarks.md", "docs/methods.md", "docs/evaluation.md", "docs/keeps.md"),
    *("docs/serving.md", "docs/memory_hierarchy.md", "docs/prefix_cache.md", "docs/deltakv.md"),
    "sparsejax/models/embedded/README.md",
)
PLAIN = {
    **{"bounds": bounds.table, "blocks": blocks.table, "overload": overload.table},
    **{"http": http_overhead.table, "soak": soak_report.text, "prefix": prefix.table, "tiers": tiers.table},
    **{"streaming": streaming.table, "ablation": ablation.table, "layers": ablation.layers},
}
KINDS = "|".join(["bench", "chart", "decode", "gains", *PLAIN, *TABLES])
MARKED = re.compile(rf"(<!-- ({KINDS}):(\S+)(?: (\w+))? -->\n).*?(<!-- /bench -->)", re.S)
BY_DTYPE = {"bench": serve_table, "decode": decode_table, "gains": gains_table}
MISSING = "Not measured yet.\n"


def rewrite(source: Path, root: Path) -> dict[Path, str]:
    """The text of ``source`` with every marked part made anew, and that of the pictures it shows."""
    made: dict[Path, str] = {}

    def part(match: re.Match) -> str:
        kind, name, dtype = match[2], match[3], match[4]
        if kind in TABLES:
            return f"{match[1]}{evaluation(kind, [root / RESULTS / one for one in name.split(',')])}{match[5]}"
        path = root / RESULTS / name
        stored = json.loads(path.read_text()) if path.exists() else {"dtypes": {}}
        if kind in BY_DTYPE:
            body = BY_DTYPE[kind](stored, dtype) if dtype in stored["dtypes"] else MISSING
        elif kind in PLAIN:
            body = PLAIN[kind](stored) if path.exists() else MISSING
        elif stored["dtypes"]:
            picture = path.with_suffix(".svg")
            made[picture] = serve_chart(stored)
            link = picture.relative_to(source.resolve().parent, walk_up=True)
            body = f"![{caption(stored)}]({link.as_posix()})\n"
        else:
            body = MISSING
        return f"{match[1]}{body}{match[5]}"

    made[source] = MARKED.sub(part, source.read_text())
    return made


def evaluation(kind: str, paths: list[Path]) -> str:
    """A table of stored evaluations."""
    stored = [json.loads(path.read_text()) for path in paths if path.exists()]
    return MISSING if len(stored) < len(paths) else TABLES[kind](stored)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    files = [path for name in PAGES if (path := ROOT / name).exists()]
    parser.add_argument("files", nargs="*", type=Path, default=files)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for source in args.files:
        for path, new in rewrite(source.resolve(), ROOT).items():
            if not path.exists() or path.read_text() != new:
                stale.append(path.relative_to(ROOT, walk_up=True).as_posix())
                if not args.check:
                    path.write_text(new)
    if args.check and stale:
        print(f"stale: {', '.join(stale)}; run scripts/bench_report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
