"""Writes the table of what goes together into docs/methods.md, from the checks that `SparsityConfig` itself makes.

`--check` changes nothing and fails where the page differs.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path

from sparsejax.errors import ConfigError
from sparsejax.sparsity.eviction import OBSERVES, Keep
from sparsejax.sparsity.kinds import SELECTS
from sparsejax.sparsity.policy import PRESETS, SparsityConfig
from sparsejax.sparsity.valid import CODECS

PAGE = Path(__file__).resolve().parent.parent / "docs/methods.md"
MARKED = re.compile(r"(<!-- combinations -->\n).*?(<!-- /combinations -->)", re.S)
PARAMETERS = {
    "every layer for itself": {},
    "`stride`": {"stride": 2},
    "`top_p`": {"top_p": 0.9},
    "`filter_layers`": {"filter_layers": "auto"},
    "`interval`": {"interval": 4},
    "`dense_layers`": {"dense_layers": 2},
    "`block`": {"block": 8},
}
KEEPS = {name: Keep(name) for name in OBSERVES} | {"pyramidkv": PRESETS["pyramidkv"].keep}
POINTS = {
    **{name: {"select": name} for name in SELECTS},
    "omnikv": {"select": "omnikv", "filter_layers": "auto"},
    "turbo": {"select": "quest", "filter_layers": "auto"},
}


def refusal(**parameters: object) -> str | None:
    """Why a policy is refused; None where it is not."""
    try:
        SparsityConfig(**parameters)
    except ConfigError as error:
        return str(error)
    return None


def text() -> str:
    """Markdown: which parameters a select takes, why not the others, and which keeps go with which selects."""
    reasons: dict[str, int] = {}
    rows = [["select", *PARAMETERS], ["---"] * (1 + len(PARAMETERS))]
    for select in SELECTS:
        cells = []
        for parameters in PARAMETERS.values():
            filters = {"filter_layers": "auto"} if select == "omnikv" and parameters else {}
            reason = refusal(**{"select": select, **filters, **parameters})
            if reason is not None:
                reason = reason.replace(f"select={select!r}", "this select")
            cells.append("yes" if reason is None else f"no ({reasons.setdefault(reason, len(reasons) + 1)})")
        rows.append([f"`{select}`", *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    refused: dict[str, list[tuple[str, ...]]] = {}
    for keep, select, codec in itertools.product(KEEPS, POINTS, CODECS):
        if reason := refusal(keep=KEEPS[keep], codec=codec, **POINTS[select]):
            reason = reason.replace(f"keep={KEEPS[keep].name!r}", "a keep").replace(f"codec={codec!r}", "a codec")
            refused.setdefault(reason, []).append((keep, select, codec))
    but = "\n".join(f"* {named(points)}: {reason}" for reason, points in refused.items())
    together = f"Of keep, select and codec everything goes together{f' but\n\n{but}' if but else '.'}"
    return f"{table}\n\n{notes}\n\n{together}\n"


def named(points: list[tuple[str, ...]]) -> str:
    """Points of keep, select and codec in few words: a product of three sets where they are one."""
    keeps, selects, codecs = ([f"`{name}`" for name in dict.fromkeys(axis)] for axis in zip(*points, strict=True))
    if len(points) < len(keeps) * len(selects) * len(codecs):
        return "; ".join(" with ".join(f"`{name}`" for name in point) for point in points)
    which = "any select" if len(selects) == len(POINTS) else ", ".join(selects)
    stored = "any codec" if len(codecs) == len(CODECS) else ", ".join(codecs)
    return f"{', '.join(keeps)} with {stored} and {which}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text()
    made = MARKED.sub(lambda match: f"{match[1]}{text()}{match[2]}", page)
    if args.check and made != page:
        print("docs/methods.md is stale; run scripts/methods_table.py", file=sys.stderr)
        return 1
    if not args.check:
        PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
