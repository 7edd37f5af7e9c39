"""`paged_prefill_attention`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks
from pallas_kernels.dispatch import Implementation, dispatch


def paged_prefill_attention(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "N K P W"],
    v_pages: Float[Array, "N K P W"] | None,
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
    """Causal attention of a ragged chunk of B rows over the pages that each row lists.

    Row b owns the tokens from `query_starts[b]` up to `query_starts[b + 1]` (monotone, at most T; a row may
    own none). `lengths[b]` is the number of its tokens after this chunk, whose keys and values are already in
    the pages: token t of row b sits at position `lengths[b] - (query_starts[b + 1] - t)` and sees positions
    up to its own. The other arguments, page lists and options are those of `paged_decode_attention`.

    Returns the output in the dtype of q and, with `return_lse`, the log-sum-exp in float32. Tokens that no
    row owns, and queries that see nothing, give zeros and -1e30. A token's result depends on its row alone
    and, up to float rounding, not on how the row was cut into chunks.

    Pools may have any shape of `pallas_kernels.layouts`: W is D, or wider; `v_pages` None means that
    `k_pages` holds K in [..., :D] and V in [..., D:2D].

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit, NoImplementation if all
    decline.
    """
    scale = checks.attention(
        q, k_pages, v_pages, page_ids, counts, lengths, logical_ids, scale, window, soft_cap, sinks
    )
    checks.shape_of("query_starts", query_starts, (lengths.shape[0] + 1,), "B + 1")
    checks.int32("query_starts", query_starts)
    return dispatch(
        "paged_prefill_attention",
        implementation,
        q,
        k_pages,
        v_pages,
        page_ids,
        counts,
        lengths,
        query_starts,
        logical_ids=logical_ids,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        return_lse=return_lse,
    )
