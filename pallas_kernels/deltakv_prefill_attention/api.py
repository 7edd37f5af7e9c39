"""`deltakv_prefill_attention`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import checks
from pallas_kernels.deltakv import Grid, Weights
from pallas_kernels.deltakv_pools import DeltaPools, check
from pallas_kernels.dispatch import Implementation, dispatch


def deltakv_prefill_attention(
    q: Float[Array, "T H D"],
    pools: DeltaPools,
    weights: Weights,
    frequencies: Float[Array, " D2"],
    tables: Int32[Array, "B S"],
    lengths: Int32[Array, " B"],
    query_starts: Int32[Array, " B+1"],
    *,
    grid: Grid,
    magnitude: float = 1.0,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "T H D"] | tuple[Float[Array, "T H D"], Float32[Array, "T H"]]:
    """Attention of a ragged chunk of B rows over the DeltaKV pages that lie before each query's own page.

    A query at position t sees pages 0 .. t // P - 1 of its row, whole; its own page is not read here: a sequence reads
    it raw and puts both together with `merge_partials`. Pages that fill up inside the chunk must be coded before the
    call. Rows and chunk are those of `paged_prefill_attention`; pools, weights, frequencies and `tables` those of
    `deltakv_decode_attention`. The queries are rotated.

    Returns the output in the dtype of q and, with `return_lse`, the log-sum-exp in float32; zeros and -1e30 where
    nothing is seen. Raises ValueError or TypeError for shapes, dtypes or options that do not fit, NoImplementation if
    all decline.
    """
    checks.shape_of("q", q, (None, None, None), "T H D")
    checks.floating("q", q)
    head_dim = q.shape[2]
    kv_heads, groups = check(pools, grid, head_dim)
    checks.shape_of("tables", tables, (lengths.shape[0], None), "B S")
    checks.queries(q, kv_heads, tables[:, None], lengths[:, None], lengths, None, None, soft_cap)
    checks.shape_of("query_starts", query_starts, (lengths.shape[0] + 1,), "B + 1")
    checks.int32("query_starts", query_starts)
    checks.shape_of("frequencies", frequencies, (head_dim // 2,), "D/2")
    wanted = (groups, 2 * kv_heads * head_dim // groups, pools.latents.shape[3])
    checks.shape_of("weights['g']", weights["g"], wanted, "A W C")
    return dispatch(
        "deltakv_prefill_attention",
        implementation,
        q,
        pools,
        weights,
        frequencies,
        tables,
        lengths,
        query_starts,
        grid=grid,
        magnitude=magnitude,
        scale=head_dim**-0.5 if scale is None else scale,
        soft_cap=soft_cap,
        return_lse=return_lse,
    )
