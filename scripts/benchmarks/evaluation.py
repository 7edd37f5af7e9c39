"""Tables from stored evaluations (`sparsejax eval --json`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BLOCKS = 4
"""Parts of a cell's documents, each with seeds of its own, over which accuracy is compared."""


def accuracy_table(stored: Sequence[dict[str, Any]]) -> str:
    """Exact answers of dense attention: a line per case, a column per length, the cell with most documents each.

    Shows the Wilson interval, the number of documents, and the range over parts of them with other seeds.
    """
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in (cell for one in stored for cell in one["policies"][0]["cells"]):
        place = cell["case"], cell["length"]
        if place not in best or cell["samples"] > best[place]["samples"]:
            best[place] = cell
    lengths = sorted({length for _, length in best})
    rows = [["case", *(f"{length} tokens" for length in lengths)]]
    for case in dict.fromkeys(case for case, _ in best):
        rows.append([f"`{case}`", *(_accuracy(best.get((case, length))) for length in lengths)])
    return markdown(rows)


def policy_table(stored: dict[str, Any]) -> str:
    """Every policy of an evaluation: right documents of each learned cell, and KV bytes at the longest length."""
    dense = stored["policies"][0]
    skipped = {tuple(cell) for cell in stored["not_learned"]}
    cells = [(cell["case"], cell["length"]) for cell in dense["cells"]]
    cells = [cell for cell in cells if cell not in skipped]
    rows = [["policy", *(f"`{case}` {length}" for case, length in cells), "KV held, MB", "read by a step, MB"]]
    for policy in stored["policies"]:
        found = {(cell["case"], cell["length"]): cell for cell in policy["cells"]}
        right = (f"{found[cell]['right']} of {found[cell]['samples']}" for cell in cells)
        kv = policy["kv"][-1]
        rows.append([policy["policy"], *right, *(f"{kv[name] / 1e6:.2f}" for name in ("held_bytes", "read_bytes"))])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body]) + "\n"


def _accuracy(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    low, high = (round(100 * bound) for bound in cell["interval"])
    size = -(-cell["samples"] // BLOCKS)
    parts = [cell["outcomes"][at : at + size] for at in range(0, cell["samples"], size)]
    shares = [100 * part.count("1") / len(part) for part in parts]
    spread = f", {min(shares):.0f} to {max(shares):.0f}" if min(shares) < max(shares) else ""
    return f"{100 * cell['accuracy']:.1f} [{low}-{high}] of {cell['samples']}{spread}"
