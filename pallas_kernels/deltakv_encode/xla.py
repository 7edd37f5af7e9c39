"""`deltakv_encode` in XLA: a loop over the pages that count, pools updated in place."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
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
    number = jnp.int32(len(page_ids)) if count is None else count
    groups = pools.latents.shape[1]

    def page(i: Array) -> Array:
        return page_vectors(k_pages, v_pages, page_ids[i][None], logical[i][None], groups, frequencies, magnitude)

    def centers(i: Array, pools: DeltaPools) -> DeltaPools:
        return seal_centers(pools, page(i), targets[i][None], grid)

    def rest(i: Array, pools: DeltaPools) -> DeltaPools:
        return seal_rest(pools, weights, page(i)[0], targets[i], tables[rows[i]], logical[i], grid)

    return lax.fori_loop(0, number, rest, lax.fori_loop(0, number, centers, pools))
