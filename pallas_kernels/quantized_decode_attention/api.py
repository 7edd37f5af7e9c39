"""`quantized_decode_attention`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels import checks, contracts
from pallas_kernels.dispatch import Implementation, dispatch


def quantized_decode_attention(
    q: Float[Array, "B H D"],
    k_codes: Shaped[Array, "N K Pc M"],
    v_codes: Shaped[Array, "N K Pc M"] | None,
    scales: Float[Array, "N K X"],
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
    """`paged_decode_attention` over pages of codes: int8, float8_e4m3fn or packed int4 (uint8).

    The codecs, their scales and the packing are those of `pallas_kernels.codes`; Pc is P, or P / 2 for int4.
    Page lists, options and results are those of `paged_decode_attention`. `v_codes` None means that `k_codes`
    holds K in [..., :D] and V in [..., D:2D]. Slots that the query does not see may hold any codes and NaN
    scales of their token; scales of a channel must be finite on every listed page.

    Scales are best applied to what is small: those of K to the query (once per page), those of V to the
    probabilities; the zero of K adds q . zero to a page's scores, that of V one number per query.

    Raises ValueError or TypeError for shapes, dtypes or options that do not fit, NoImplementation if all
    decline.
    """
    checks.shape_of("q", q, (lengths.shape[0], None, None), "B H D")
    checks.floating("q", q)
    _, kv_heads, _, head_dim = contracts.coded_pools(k_codes, v_codes, scales, q.shape[2])
    checks.queries(q, kv_heads, page_ids, counts, lengths, logical_ids, window, soft_cap)
    checks.head_sinks(sinks, q.shape[1])
    return dispatch(
        "quantized_decode_attention",
        implementation,
        q,
        k_codes,
        v_codes,
        scales,
        page_ids,
        counts,
        lengths,
        logical_ids=logical_ids,
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        return_lse=return_lse,
    )
