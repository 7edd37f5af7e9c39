"""`page_scores`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks, contracts
from pallas_kernels.dispatch import Implementation, dispatch


def page_scores(
    q: Float[Array, "B H D"],
    bounds: Float[Array, "N K X"],
    page_ids: Int32[Array, "B Kl S"],
    counts: Int32[Array, "B Kl"],
    *,
    group: str = "max",
    scale: float | None = None,
    implementation: Implementation = None,
) -> Float32[Array, "B K S"]:
    """Upper bounds of the attention scores of one query per row with the keys of each listed page.

    For a query q and a page whose keys lie between `low` and `high`, no score exceeds
    scale * sum over d of max(q_d low_d, q_d high_d) (Quest, arXiv 2406.10774). It is one dot product:
    [min(q, 0), max(q, 0)] with the entry of the page in `bounds` (see `page_bounds`).

    `page_ids` are physical; the first `counts` of each list are read, the others may hold anything. Kl is 1
    (all KV heads share the list) or K. `group` reduces the query heads of a KV head: "max", "mean" or "sum".
    `scale` is D ** -0.5 by default. Bounds of listed pages must be finite; others may hold NaN.

    Returns float32 scores in the order of the lists, -1e30 past the counts. A row's scores do not depend on
    the other rows. Raises ValueError or TypeError for shapes, dtypes or options that do not fit.
    """
    checks.shape_of("q", q, (None,) * 3, "B H D")
    checks.floating("q", q)
    rows, heads, head_dim = q.shape
    kv_heads = contracts.bounds_pool(bounds, head_dim)
    checks.grouped(heads, kv_heads)
    contracts.listed(rows, kv_heads, page_ids, counts)
    contracts.group_reduction(group)
    scale = head_dim**-0.5 if scale is None else scale
    return dispatch("page_scores", implementation, q, bounds, page_ids, counts, group=group, scale=scale)
