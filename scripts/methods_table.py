"""Writes the table of what goes together into docs/methods.md, from the checks that `SparsityConfig` itself makes.

`--check` changes nothing and fails where the page differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from sparsejax.errors import ConfigError
from sparsejax.sparsity.eviction import OBSERVES
from sparsejax.sparsity.kinds import SELECTS
from sparsejax.sparsity.policy import SparsityConfig
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
    apart = [
        f"`{keep}` with `{select}`: {reason}"
        for keep in OBSERVES
        for select in SELECTS
        if (reason := refusal(keep=keep, select=select, filter_layers="auto" if select == "omnikv" else None))
    ]
    together = "\n".join(apart) or "Every keep goes with every select."
    return f"{table}\n\n{notes}\n\n{together} {codecs()}\n"


def codecs() -> str:
    """Whether codecs go with selects and keeps, which all of a kind must answer alike."""
    coded = [codec for codec in CODECS if codec != "dense"]
    selects = {
        refusal(select=select, codec=codec, filter_layers="auto" if select == "omnikv" else None)
        for select in SELECTS
        for codec in coded
    }
    keeps = {refusal(keep=keep, codec=codec) is None for keep in OBSERVES if keep != "all" for codec in coded}
    if selects != {None} or keeps != {False}:
        raise SystemExit("codecs no longer go with every select and no keep; say here with which they do")
    names = ", ".join(f"`{codec}`" for codec in coded)
    return f"The codecs {names} go with every select and with no keep that evicts."


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
