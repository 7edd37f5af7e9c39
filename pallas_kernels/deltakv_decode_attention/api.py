"""`deltakv_decode_attention`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks
from pallas_kernels.deltakv import Grid, Weights
from pallas_kernels.deltakv_pools import DeltaPools, check
from pallas_kernels.dispatch import Implementation, dispatch


def deltakv_decode_attention(
    q: Float[Array, "B H D"],
    pools: DeltaPools,
    weights: Weights,
    frequencies: Float[Array, " D2"],
    page_ids: Int32[Array, "B 1 J"],
    counts: Int32[Array, "B 1"],
    lengths: Int32[Array, " B"],
    tables: Int32[Array, "B S"],
    *,
    grid: Grid,
    logical_ids: Int32[Array, "B 1 J"] | None = None,
    magnitude: float = 1.0,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B H D"] | tuple[Float[Array, "B H D"], Float32[Array, "B H"]]:
    """Attention of one query per row over the sealed pages that the row lists; page lists as in
    `paged_decode_attention`, one for all heads. Every listed page is full; positions at `lengths` or later are not
    seen.

    `tables` are all physical pages of each sequence, by logical index: references name centers of earlier pages. Keys
    are rebuilt and rotated at their positions: dimension d with d + D/2, by `frequencies` [D/2] radians per position,
    cos and sin times `magnitude`. Values are absorbed, since g has no bias: sum p (g z + b) = g sum p z + sum p b. Only
    ``weights["g"]`` is read. The queries are rotated.

    Returns the output in the dtype of q and, with `return_lse`, the log-sum-exp of the scores in float32; a query that
    sees no token gives zeros and -1e30. Work follows each row's own count.

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit, NoImplementation if all decline.
    """
    checks.shape_of("q", q, (lengths.shape[0], None, None), "B H D")
    checks.floating("q", q)
    head_dim = q.shape[2]
    kv_heads, groups = check(pools, grid, head_dim)
    checks.queries(q, kv_heads, page_ids, counts, lengths, logical_ids, None, soft_cap)
    checks.require(page_ids.shape[1] == 1, f"page_ids must have one list for all heads; got {page_ids.shape[1]}")
    checks.shape_of("tables", tables, (q.shape[0], None), "B S")
    checks.shape_of("frequencies", frequencies, (head_dim // 2,), "D/2")
    wanted = (groups, 2 * kv_heads * head_dim // groups, pools.latents.shape[3])
    checks.shape_of("weights['g']", weights["g"], wanted, "A W C")
    return dispatch(
        "deltakv_decode_attention",
        implementation,
        q,
        pools,
        weights,
        frequencies,
        page_ids,
        counts,
        lengths,
        tables,
        grid=grid,
        logical_ids=logical_ids,
        magnitude=magnitude,
        scale=head_dim**-0.5 if scale is None else scale,
        soft_cap=soft_cap,
        return_lse=return_lse,
    )
