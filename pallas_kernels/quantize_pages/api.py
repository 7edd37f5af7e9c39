"""`quantize_pages`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import contracts
from pallas_kernels.dispatch import Implementation, dispatch


def quantize_pages(
    k_codes: Shaped[Array, "N K Pc M"],
    v_codes: Shaped[Array, "N K Pc M"] | None,
    scales: Float[Array, "N K X"],
    k_pages: Float[Array, "R K P L"],
    v_pages: Float[Array, "R K P L"] | None,
    page_ids: Int32[Array, " S"],
    targets: Int32[Array, " S"],
    *,
    head_dim: int,
    count: Int32[Array, ""] | None = None,
    implementation: Implementation = None,
) -> tuple[Shaped[Array, "N K Pc M"], Shaped[Array, "N K Pc M"] | None, Float[Array, "N K X"]]:
    """Codes full pages of dense pools into coded ones; returns the new (k_codes, v_codes, scales).

    Page `page_ids[i]` of the dense pools goes to page `targets[i]` of the coded ones, for the first `count`
    of the lists (None: all); the rest may hold anything. Page 0 absorbs writes; every other target must be
    named once at most. Call it under `jax.jit` with the coded pools donated: they are then updated in place.

    The dtype of the codes names the codec (see `pallas_kernels.codes`): int8 and fp8 scale by the largest
    magnitude of a group, int4 spans from its smallest to its largest value; codes are the nearest ones under
    the scales as stored. `v_codes` or `v_pages` None means that K and V of `head_dim` lie side by side in one
    pool.

    Raises ValueError or TypeError for shapes or dtypes that do not fit together.
    """
    contracts.transfer(k_codes, v_codes, scales, k_pages, v_pages, head_dim)
    contracts.page_moves(page_ids, targets, count)
    return dispatch(
        "quantize_pages",
        implementation,
        k_codes,
        v_codes,
        scales,
        k_pages,
        v_pages,
        page_ids,
        targets,
        head_dim=head_dim,
        count=count,
    )
