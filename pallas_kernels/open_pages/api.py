"""`open_pages`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import contracts
from pallas_kernels.dispatch import Implementation, dispatch


def open_pages(
    k_pages: Float[Array, "R K P L"],
    v_pages: Float[Array, "R K P L"] | None,
    k_codes: Shaped[Array, "N K Pc M"],
    v_codes: Shaped[Array, "N K Pc M"] | None,
    scales: Float[Array, "N K X"],
    page_ids: Int32[Array, " S"],
    targets: Int32[Array, " S"],
    *,
    head_dim: int,
    count: Int32[Array, ""] | None = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "R K P L"], Float[Array, "R K P L"] | None]:
    """Decodes pages of codes into dense scratch pages; returns the new (k_pages, v_pages).

    Page `page_ids[i]` of the coded pools goes to page `targets[i]` of the dense ones, in their dtype, for the
    first `count` of the lists (None: all); the rest may hold anything. Page 0 absorbs writes; every other
    target must be named once at most. Call it under `jax.jit` with the dense pools donated: they are then
    updated in place. The inverse of `quantize_pages`, whose description of the pools holds here.

    Raises ValueError or TypeError for shapes or dtypes that do not fit together.
    """
    contracts.transfer(k_codes, v_codes, scales, k_pages, v_pages, head_dim)
    contracts.page_moves(page_ids, targets, count)
    return dispatch(
        "open_pages",
        implementation,
        k_pages,
        v_pages,
        k_codes,
        v_codes,
        scales,
        page_ids,
        targets,
        head_dim=head_dim,
        count=count,
    )
