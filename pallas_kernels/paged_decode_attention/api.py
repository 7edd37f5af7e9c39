"""`paged_decode_attention`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Implementation, dispatch


def paged_decode_attention(
    q: Float[Array, "B H D"],
    k_pages: Float[Array, "N K P W"],
    v_pages: Float[Array, "N K P W"] | None,
    page_ids: Int32[Array, "B Kl J"],
    counts: Int32[Array, "B Kl"],
    lengths: Int32[Array, " B"],
    *,
    logical_ids: Int32[Array, "B Kl J"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B H D"] | tuple[Float[Array, "B H D"], Float32[Array, "B H"]]:
    """Attention of one query per row, at position `lengths - 1`, over the pages that the row lists.

    `page_ids` are physical; the first `counts` of each list are read, the others may hold anything. Kl is 1
    (all KV heads share the list) or K. `logical_ids` gives, ascending, the index of each listed page in its
    sequence; None means pages 0, 1, 2, ... The token at offset o of logical page i has position p = i * P + o
    and is visible iff p < lengths and, with a `window`, p >= lengths - window. Invisible slots may hold NaN.

    `lengths` counts tokens, the query's own included. `scale` multiplies the scores (default D ** -0.5);
    `soft_cap` c turns a score s into c * tanh(s / c); `sinks` adds one logit per query head to the softmax
    denominator.

    Returns the output in the dtype of q and, with `return_lse`, the log-sum-exp of the scores (sink included)
    in float32, so that partial results merge. A query that sees no token gives zeros and -1e30. A row's
    result does not depend on the other rows. Work follows each row's own count.

    Pools may have any shape of `pallas_kernels.layouts`: W is D, or wider; `v_pages` None means that
    `k_pages` holds K in [..., :D] and V in [..., D:2D].

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit, NoImplementation if all
    decline.
    """
    scale = checks.attention(
        q, k_pages, v_pages, page_ids, counts, lengths, logical_ids, scale, window, soft_cap, sinks
    )
    checks.require(
        q.shape[0] == lengths.shape[0],
        f"q must have one query per row of lengths; got {q.shape[0]} queries and {lengths.shape[0]} rows",
    )
    return dispatch(
        "paged_decode_attention",
        implementation,
        q,
        k_pages,
        v_pages,
        page_ids,
        counts,
        lengths,
        logical_ids=logical_ids,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        return_lse=return_lse,
    )
