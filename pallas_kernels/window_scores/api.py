"""`window_scores`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks, contracts
from pallas_kernels.dispatch import Implementation, dispatch


def window_scores(
    q: Float[Array, "B W H D"],
    k_pages: Float[Array, "N K P M"],
    page_ids: Int32[Array, "B Kl S"],
    counts: Int32[Array, "B Kl"],
    lengths: Int32[Array, " B"],
    *,
    logical_ids: Int32[Array, "B Kl S"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    group: str = "mean",
    implementation: Implementation = None,
) -> Float32[Array, "B K S P"]:
    """The probability that the last W queries of each row give to every token slot of its listed pages.

    Query i of row b sits at position `lengths[b] - W + i`; queries before position 0 (rows shorter than W)
    are not read. Each query's scores are softmaxed over the listed tokens that it sees, as attention does it:
    causal, with `scale`, `window`, `soft_cap` and `sinks` as in `paged_decode_attention`. The probabilities
    are reduced over the query heads of a KV head by `group` ("mean", "sum" or "max"), then summed over the
    queries (SnapKV, arXiv 2404.14469; pooling over neighbours is left to the caller, as is leaving out the W
    tokens themselves).

    `k_pages` is dense; K and V may lie side by side in it. Slots that no query sees may hold NaN and give 0,
    as do entries past the counts. Work follows each row's own count.

    Returns float32 in the order of the lists. Raises ValueError or TypeError for shapes, dtypes or options
    that do not fit.
    """
    checks.shape_of("q", q, (lengths.shape[0], None, None, None), "B W H D")
    checks.floating("q", q)
    _, kv_heads, _ = contracts.key_pages(k_pages, None, q.shape[3])
    checks.queries(q, kv_heads, page_ids, counts, lengths, logical_ids, window, soft_cap)
    checks.head_sinks(sinks, q.shape[2])
    contracts.group_reduction(group)
    return dispatch(
        "window_scores",
        implementation,
        q,
        k_pages,
        page_ids,
        counts,
        lengths,
        logical_ids=logical_ids,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        group=group,
    )
