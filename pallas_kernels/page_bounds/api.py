"""`page_bounds`: the public function."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import checks, contracts
from pallas_kernels.dispatch import Implementation, dispatch


def page_bounds(
    bounds: Float[Array, "N K X"],
    k_pages: Shaped[Array, "M K Pc D"],
    page_ids: Int32[Array, " S"],
    targets: Int32[Array, " S"] | None = None,
    *,
    scales: Float[Array, "M K Y"] | None = None,
    count: Int32[Array, ""] | None = None,
    implementation: Implementation = None,
) -> Float[Array, "N K X"]:
    """Stores the smallest and the largest key per channel and KV head of full pages; returns the new bounds.

    Page `page_ids[i]` of `k_pages` goes to entry `targets[i]` of `bounds` (None: the same ids), for the first
    `count` of the lists (None: all); the rest may hold anything. Entry 0 absorbs writes, as page 0 of a pool
    does; every other target must be named once at most. Call it under `jax.jit` with `bounds` donated: they
    are then updated in place.

    `bounds` holds the minimum in [..., :X / 2] and the maximum in [..., X / 2:]. The minor dimension of the
    keys is X / 2, or more on platforms that pad pools or store K and V side by side: the first X / 2 values
    are read. `k_pages` is dense, or coded with its `scales` (see `pallas_kernels.codes`): the bounds are then
    those of the decoded keys. A dtype narrower than that of the keys is rounded outwards, so that they still hold.

    Raises ValueError or TypeError for shapes or dtypes that do not fit together.
    """
    heads = contracts.bounds_pool(bounds, bounds.shape[-1] // 2)
    _, kv_heads, _ = contracts.key_pages(k_pages, scales, bounds.shape[2] // 2)
    checks.require(
        kv_heads == heads, f"bounds and k_pages must have the same KV heads; got {heads} and {kv_heads}"
    )
    targets = page_ids if targets is None else targets
    contracts.page_moves(page_ids, targets, count)
    return dispatch(
        "page_bounds", implementation, bounds, k_pages, page_ids, targets, scales=scales, count=count
    )
