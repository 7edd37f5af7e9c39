"""`attention_mass`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import checks, contracts
from pallas_kernels.dispatch import Implementation, dispatch


def attention_mass(
    q: Float[Array, "T H D"],
    k_pages: Shaped[Array, "N K Pc M"],
    page_ids: Int32[Array, "B Kl S"],
    counts: Int32[Array, "B Kl"],
    lengths: Int32[Array, " B"],
    lse: Float32[Array, "T H"],
    query_starts: Int32[Array, " B+1"] | None = None,
    *,
    scales: Float[Array, "N K X"] | None = None,
    logical_ids: Int32[Array, "B Kl S"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    group: str = "sum",
    per_token: bool = False,
    implementation: Implementation = None,
) -> Float32[Array, "B K S"] | Float32[Array, "B K S P"]:
    """The probability that queries gave to each listed page, or with `per_token` to each token slot of it.

    The probability of a key under a query is exp(score - lse), with the log-sum-exp that attention returned
    (sinks included, if it had any) and the scores that it used: `scale`, `soft_cap`, `window` and what is
    visible mean what they mean in `paged_decode_attention`. Without `query_starts` T = B, and row b has one
    query, at position `lengths[b] - 1`. With them the rows own ragged chunks as in `paged_prefill_attention`.

    For each query the probabilities are summed over the tokens of a page (unless `per_token`), then reduced
    over the query heads of a KV head by `group` ("sum", "mean" or "max"), then summed over the queries of the
    row.

    `k_pages` is dense, or coded with its `scales` (see `pallas_kernels.codes`): Pc is P, or P / 2 for codes
    of int4. K and V may lie side by side in it: the first D values are keys. Slots that no query of the row
    sees may hold NaN and give 0, as do entries past the counts.

    Returns float32 in the order of the lists. Work follows each row's own count. Raises ValueError or
    TypeError for shapes, dtypes or options that do not fit.
    """
    checks.shape_of("q", q, (None,) * 3, "T H D")
    checks.floating("q", q)
    _, kv_heads, _ = contracts.key_pages(k_pages, scales, q.shape[2])
    checks.queries(q, kv_heads, page_ids, counts, lengths, logical_ids, window, soft_cap)
    checks.shape_of("lse", lse, tuple(q.shape[:2]), "T H")
    contracts.group_reduction(group)
    if query_starts is None:
        checks.shape_of("lengths", lengths, (q.shape[0],), "B = T")
    else:
        checks.shape_of("query_starts", query_starts, (lengths.shape[0] + 1,), "B + 1")
        checks.int32("query_starts", query_starts)
    return dispatch(
        "attention_mass",
        implementation,
        q,
        k_pages,
        page_ids,
        counts,
        lengths,
        lse,
        query_starts,
        scales=scales,
        logical_ids=logical_ids,
        scale=q.shape[2] ** -0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
        group=group,
        per_token=per_token,
    )
