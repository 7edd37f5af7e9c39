"""One file per way to evict: a function from a row's cache in one layer to scores of its tokens, larger stays.

A function gets a `view.View` and returns ``[K or 1, U]`` for the U token slots of the row's pages. What lies at
slots without a token may be any number. Sinks, recents, budgets and ties are not its concern.
"""

from __future__ import annotations

from sparsejax.sparsity.keep import expected_attention, h2o, keydiff, random, rkv, snapkv, streaming
from sparsejax.sparsity.keep.view import View

__all__ = ["SCORES", "View"]

SCORES = {
    "snapkv": snapkv.scores,
    "keydiff": keydiff.scores,
    "expected_attention": expected_attention.scores,
    "rkv": rkv.scores,
    "h2o": h2o.scores,
    "random": random.scores,
    "streaming": streaming.scores,
}
