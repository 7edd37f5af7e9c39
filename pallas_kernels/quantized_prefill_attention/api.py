"""`quantized_prefill_attention`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import checks, contracts
from pallas_kernels.dispatch import Implementation, dispatch


def quantized_prefill_attention(
    q: Float[Array, "T H D"],
    k_codes: Shaped[Array, "N K Pc M"],
    v_codes: Shaped[Array, "N K Pc M"] | None,
    scales: Float[Array, "N K X"],
    page_ids: Int32[Array, "B Kl J"],
    counts: Int32[Array, "B Kl"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    *,
    logical_ids: Int32[Array, "B Kl J"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float32[Array, "T H"]]:
    """Attention of a ragged chunk of B rows over the pages of codes that lie before each query's own page.

    A query at position t sees the listed pages whose logical id is less than t // P, whole (inside the window).
    Its own page is not read here, even where it is listed: a sequence reads it raw and puts both together with
    `merge_partials`. So what a query sees depends on its position alone, not on how the row was cut into
    chunks; pages that fill up inside the chunk must be coded before the call.

    Rows, chunk, page lists and options are those of `paged_prefill_attention`, codes and scales those of
    `quantized_decode_attention`.

    Returns the output in the dtype of q and, with `return_lse`, the log-sum-exp in float32; zeros and -1e30
    where nothing is seen. Raises ValueError or TypeError for shapes, dtypes or options that do not fit,
    NoImplementation if all decline.
    """
    checks.shape_of("q", q, (None, None, None), "T H D")
    checks.floating("q", q)
    _, kv_heads, _, head_dim = contracts.coded_pools(k_codes, v_codes, scales, q.shape[2])
    checks.queries(q, kv_heads, page_ids, counts, lengths, logical_ids, window, soft_cap)
    checks.head_sinks(sinks, q.shape[1])
    checks.shape_of("query_starts", query_starts, (lengths.shape[0] + 1,), "B + 1")
    checks.int32("query_starts", query_starts)
    return dispatch(
        "quantized_prefill_attention",
        implementation,
        q,
        k_codes,
        v_codes,
        scales,
        page_ids,
        counts,
        lengths,
        query_starts,
        logical_ids=logical_ids,
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        return_lse=return_lse,
    )
