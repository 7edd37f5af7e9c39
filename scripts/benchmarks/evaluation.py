"""Tables from stored evaluations (`sparsejax eval --json`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

WORST = ("loses most on", "points to dense there [95%]")
MISSING = "not measured yet"
FAILURES = (
    ("eviction by recency loses what its window left", "niah_single", "streaming 0.25, streaming 0.5"),
    ("so does reading the newest pages only", "niah_single", "window 0.25, window 0.5"),
    ("random pages answer by their share", "niah_single", "random 0.25, random 0.5, oracle 0.25"),
    ("so do random tokens", "kv_dense", "random_keep 0.1, random_keep 0.25, random_keep 0.5"),
    ("attention of the question finds its answer", "niah_multikey_dense", "snapkv 0.1, snapkv 0.25, snapkv 0.5"),
    ("and loses that of a later one", "niah_multikey_dense_later", "snapkv 0.1, snapkv 0.25, snapkv 0.5"),
    ("several later questions fail more", "kv_dense_turns", "snapkv 0.5, h2o 0.5, expected_attention 0.5"),
    ("good scores fall off a cliff at nine tenths", "kv_dense_later", "keydiff 0.25, keydiff 0.1, rkv 0.25, rkv 0.1"),
    ("the more so where several facts must stay", "kv_dense_turns", "keydiff 0.25, keydiff 0.1, rkv 0.25, rkv 0.1"),
    ("page bounds miss facts among many alike", "kv_dense_turns", "quest 0.25, quest 0.5, oracle 0.25"),
)
"""What is known, the case, and the policies that show it."""
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


def policy_table(stored: Sequence[dict[str, Any]]) -> str:
    """Every policy of an evaluation: right documents of each learned cell, the worst of them, and KV bytes at the
    longest length."""
    (stored,) = stored
    dense, cells = stored["policies"][0], _learned(stored)
    rows = [["policy", *(f"`{case}` {length}" for case, length in cells), *WORST, "KV held, MB", "read by a step, MB"]]
    for policy in stored["policies"]:
        found = _cells(policy)
        right = (f"{found[cell]['right']} of {found[cell]['samples']}" for cell in cells)
        lost = ("", "") if policy is dense else _worst(found, cells)
        kv = policy["kv"][-1] if policy["kv"] else None
        held_read = (kv["held_bytes"], kv["read_bytes"] + kv.get("bounds_bytes", 0)) if kv else ()
        rows.append([policy["policy"], *right, *lost, *([f"{number / 1e6:.2f}" for number in held_read] or ("-", "-"))])
    return markdown(rows)


def cliff_table(stored: Sequence[dict[str, Any]]) -> str:
    """How far each method goes with at most one point lost on the worst learned cell."""
    (stored,) = stored
    found = [(method, cliff) for method, cliff in stored["cliffs"].items() if method != "dense"]
    rows = [["policy", "fewest bytes read at most one point lost"]]
    rows += [[f"`{cliff['policy']}`", f"{cliff['saving']:.2f} times fewer"] for _, cliff in found if cliff]
    rows.append([", ".join(f"`{method}`" for method, cliff in found if not cliff) or "-", "no budget that was tried"])
    return markdown(rows)


def failure_table(stored: Sequence[dict[str, Any]]) -> str:
    """Failures that the field knows, where these evaluations show them: the first one that has all cells of a line."""
    rows = [["what is known", "where it shows", "right answers"]]
    for known, case, policies in FAILURES:
        answers = (_answers(one, case, policies.split(", ")) for one in stored)
        rows.append([known, f"`{case}`", next((found for found in answers if found), MISSING)])
    return markdown(rows)


def proxy_table(stored: Sequence[dict[str, Any]]) -> str:
    """What policies lose inside a model (`sparsejax eval --proxies`), at the longest length."""
    ((*_, longest),) = stored
    rows = [
        ["policy", "mass recall", "worst layer", "output error", "KL mean", "p99", "max", "same top token", "diverges"]
    ]
    for one in longest["policies"]:
        recall, error = one["recall"], one["error"]
        worst = min(range(len(recall)), key=recall.__getitem__)
        first = one["first_divergence"]
        rows.append([
            one["policy"], f"{sum(recall) / len(recall):.3f}", f"{recall[worst]:.3f} (layer {worst})",
            f"{sum(error) / len(error):.3f}", *(f"{one['divergence'][name]:.2g}" for name in ("mean", "p99", "max")),
            f"{one['agreement']:.0%}", "never" if first is None else f"at token {first}",
        ])  # fmt: skip
    return markdown(rows)


def spread_table(stored: Sequence[dict[str, Any]]) -> str:
    """Dense answers of models that differ in their training seed: a line per case and length, a column per model."""
    cells = [(cell["case"], cell["length"]) for cell in stored[0]["policies"][0]["cells"]]
    rows = [["case", "tokens", *(one["model"] for one in stored), "range, points"]]
    for case, length in cells:
        found = [_cells(one["policies"][0])[case, length] for one in stored]
        shares = [100 * cell["accuracy"] for cell in found]
        rows.append([f"`{case}`", str(length), *map(_accuracy, found), f"{max(shares) - min(shares):.1f}"])
    return markdown(rows)


TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "accuracy": accuracy_table,
    "policies": policy_table,
    "cliffs": cliff_table,
    "failures": failure_table,
    "proxies": proxy_table,
    "spread": spread_table,
}
"""By the kind of marker that asks for them."""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body]) + "\n"


def _cells(policy: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(cell["case"], cell["length"]): cell for cell in policy["cells"]}


def _learned(stored: dict[str, Any]) -> list[tuple[str, int]]:
    skipped = {tuple(cell) for cell in stored["not_learned"]}
    return [cell for cell in _cells(stored["policies"][0]) if cell not in skipped]


def _worst(found: dict[tuple[str, int], dict[str, Any]], cells: list[tuple[str, int]]) -> tuple[str, str]:
    """The cell that loses most to dense on the same documents, and how much."""
    cell = min((found[cell] for cell in cells), key=lambda cell: cell["difference"])
    low, high = (f"{100 * bound:+.0f}" for bound in cell["difference_interval"])
    return f"`{cell['case']}`", f"{100 * cell['difference']:+.0f} [{low} to {high}]"


def _answers(stored: dict[str, Any], case: str, policies: Sequence[str]) -> str | None:
    cells = ((policy["policy"], cell) for policy in stored["policies"] for cell in policy["cells"])
    found = {name: cell for name, cell in cells if cell["case"] == case}
    if not found.keys() >= set(policies):
        return None
    return ", ".join(f"{name}: {found[name]['right']} of {found[name]['samples']}" for name in policies)


def _accuracy(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    low, high = (round(100 * bound) for bound in cell["interval"])
    size = -(-cell["samples"] // BLOCKS)
    parts = [cell["outcomes"][at : at + size] for at in range(0, cell["samples"], size)]
    shares = [100 * part.count("1") / len(part) for part in parts]
    spread = f", {min(shares):.0f} to {max(shares):.0f}" if min(shares) < max(shares) else ""
    return f"{100 * cell['accuracy']:.1f} [{low}-{high}] of {cell['samples']}{spread}"
