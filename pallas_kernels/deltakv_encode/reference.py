"""`deltakv_encode` page by page, in plain jnp."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.deltakv import Grid, Weights
from pallas_kernels.deltakv_encode.transform import page_vectors, seal_centers, seal_rest
from pallas_kernels.deltakv_pools import DeltaPools


def deltakv_encode(
    pools: DeltaPools,
    weights: Weights,
    k_pages: Array,
    v_pages: Array,
    page_ids: Array,
    targets: Array,
    tables: Array,
    rows: Array,
    logical: Array,
    *,
    grid: Grid,
    frequencies: Array | None = None,
    magnitude: float = 1.0,
    count: Array | None = None,
) -> DeltaPools:
    """See `pallas_kernels.deltakv_encode`."""
    listed = jnp.arange(len(page_ids)) < (len(page_ids) if count is None else count)
    page_ids, targets = jnp.where(listed, page_ids, 0), jnp.where(listed, targets, 0)
    x = page_vectors(k_pages, v_pages, page_ids, logical, pools.latents.shape[1], frequencies, magnitude)
    pools = seal_centers(pools, jnp.where(listed[:, None, None, None], x, 0), targets, grid)
    for i in range(len(page_ids)):
        sealed = seal_rest(pools, weights, x[i], targets[i], tables[rows[i]], logical[i], grid)
        pools = DeltaPools(*(
            None if new is None else jnp.where(listed[i], new, old) for new, old in zip(sealed, pools, strict=True)
        ))
    return pools
