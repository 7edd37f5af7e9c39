"""`deltakv_encode`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from pallas_kernels import checks, contracts
from pallas_kernels.deltakv import Grid, Weights
from pallas_kernels.deltakv_pools import DeltaPools, check
from pallas_kernels.dispatch import Implementation, dispatch


def deltakv_encode(
    pools: DeltaPools,
    weights: Weights,
    k_pages: Float[Array, "N2 K P D"],
    v_pages: Float[Array, "N2 K P D"],
    page_ids: Int32[Array, " M"],
    targets: Int32[Array, " M"],
    tables: Int32[Array, "B S"],
    rows: Int32[Array, " M"],
    logical: Int32[Array, " M"],
    *,
    grid: Grid,
    frequencies: Float[Array, " D2"] | None = None,
    magnitude: float = 1.0,
    count: Int32[Array, ""] | None = None,
    implementation: Implementation = None,
) -> DeltaPools:
    """Codes full pages of dense pools into DeltaKV pools; returns the new pools.

    Page `page_ids[i]` of the dense pools is page `logical[i]` of the sequence whose physical pages are
    `tables[rows[i]]`, and goes to page `targets[i]`, for the first `count` of the lists (None: all). Every earlier page
    of the sequence must be coded already, or by this call. Codes are of keys before rotation: where the pages hold
    rotated ones, `frequencies` [D/2] and `magnitude` say how (see `deltakv_decode_attention`), and it is undone in
    float32. Page 0 absorbs writes; every other target must be named once
    at most. Under `jax.jit` with the pools donated they are updated in place.

    Raises ValueError or TypeError for shapes or dtypes that do not fit together.
    """
    _, heads, size, head_dim = checks.pools(k_pages, v_pages, k_pages.shape[3])
    checks.require(size == grid.page_size, f"pages must hold {grid.page_size} tokens, as the grid says; got {size}")
    checks.require(pools.centers.shape[2] == heads, f"the pools have {pools.centers.shape[2]} KV heads, pages {heads}")
    check(pools, grid, head_dim)
    contracts.page_moves(page_ids, targets, count)
    for name, array in (("rows", rows), ("logical", logical)):
        checks.shape_of(name, array, tuple(page_ids.shape), "M")
        checks.int32(name, array)
    checks.shape_of("tables", tables, (None, None), "B S")
    checks.int32("tables", tables)
    if frequencies is not None:
        checks.shape_of("frequencies", frequencies, (head_dim // 2,), "D/2")
    args = (pools, weights, k_pages, v_pages, page_ids, targets, tables, rows, logical)
    turned = {"frequencies": frequencies, "magnitude": magnitude}
    return dispatch("deltakv_encode", implementation, *args, grid=grid, count=count, **turned)
