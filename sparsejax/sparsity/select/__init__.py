"""One file per way to select: a function from a decode query to scores of its pages, larger is read first.

A function gets a `query.Query` and the rows' policies, and returns ``[B, K or 1, S]`` in the order of the page
lists. What lies past a row's count may hold anything. Sinks, recents, budgets and ties are not its concern.
"""

from __future__ import annotations

from sparsejax.sparsity.select import omnikv, oracle, quest, random, strided, window
from sparsejax.sparsity.select.query import Query

__all__ = ["SCORES", "Query"]

SCORES = {
    "window": window.scores,
    "strided": strided.scores,
    "random": random.scores,
    "oracle": oracle.scores,
    "quest": quest.scores,
    "omnikv": omnikv.scores,
}
