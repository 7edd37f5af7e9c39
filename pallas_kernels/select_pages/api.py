"""`select_pages`: the public function."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float32, Int32

from pallas_kernels import checks, contracts
from pallas_kernels.dispatch import Implementation, dispatch


class Selection(NamedTuple):
    """Page lists as attention takes them: ascending in logical id, `counts` entries valid, the others 0."""

    page_ids: Int32[Array, "B Ks J"]
    logical_ids: Int32[Array, "B Ks J"]
    counts: Int32[Array, "B Ks"]


def select_pages(
    scores: Float32[Array, "B Ks S"],
    page_ids: Int32[Array, "B Kl S"],
    counts: Int32[Array, "B Kl"],
    budgets: Int32[Array, " B"] | Int32[Array, "B Ks"],
    *,
    width: int,
    sinks: Int32[Array, " B"] | None = None,
    recents: Int32[Array, " B"] | None = None,
    logical_ids: Int32[Array, "B Kl S"] | None = None,
    implementation: Implementation = None,
) -> Selection:
    """The `budgets` best pages of each list by score, in ascending order.

    A list holds `counts` pages, the open one included; `page_ids` are physical and `logical_ids` their
    indices in the sequence (None: 0, 1, 2, ...). Kl is 1 or Ks, and Ks is 1 (one selection for all KV heads)
    or K. The first `sinks` and the last `recents` pages of a list are always selected (by default none and
    one: the open page) and count against the budget, which they may exceed. Their scores are not read, nor
    those past the counts: these may hold NaN. Of equal scores the earlier page is selected.

    Budgets count pages, per row or per list. A list selects min(counts, max(budget, pinned), width) pages, J
    = `width`; where the width does not hold the pinned pages, recent ones come first, then sinks. A budget of
    at least `counts` so selects every page, which is dense attention.

    Returns (page_ids, logical_ids [B, Ks, J], counts [B, Ks]). Raises ValueError or TypeError for arguments
    that do not fit.
    """
    checks.shape_of("scores", scores, (None,) * 3, "B Ks S")
    checks.floating("scores", scores)
    rows, lists, pages = scores.shape
    contracts.listed(rows, lists, page_ids, counts)
    checks.shape_of("page_ids", page_ids, (rows, None, pages), "B Kl S")
    checks.shape_of("budgets", budgets, (rows, lists) if len(budgets.shape) == 2 else (rows,), "B or B Ks")
    checks.int32("budgets", budgets)
    checks.require(width >= 1, f"width must be at least 1 page; got {width}")
    for name, array in (("sinks", sinks), ("recents", recents)):
        if array is not None:
            checks.shape_of(name, array, (rows,), "B")
            checks.int32(name, array)
    if logical_ids is not None:
        checks.shape_of("logical_ids", logical_ids, tuple(page_ids.shape), "B Kl S")
        checks.int32("logical_ids", logical_ids)
    chosen = dispatch(
        "select_pages",
        implementation,
        scores,
        page_ids,
        counts,
        budgets,
        width=width,
        sinks=sinks,
        recents=recents,
        logical_ids=logical_ids,
    )
    return Selection(*chosen)
