"""The two passes of sealing: all centers first, since pages of one call may refer to each other's."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.deltakv import Grid, Weights, code_page, shortlisted, vectors
from pallas_kernels.deltakv_pools import DeltaPools, put_centers, put_latents, put_named, take_centers
from pallas_kernels.rotation import unrotated


def page_vectors(
    k_pages: Array,
    v_pages: Array,
    page_ids: Array,
    logical: Array,
    groups: int,
    frequencies: Array | None,
    magnitude: float,
) -> Array:
    """x [M, P, A, W] of listed pages of dense pools."""
    keys, values = k_pages[page_ids].swapaxes(1, 2), v_pages[page_ids].swapaxes(1, 2)
    if frequencies is not None:
        positions = (logical[:, None] * keys.shape[1] + jnp.arange(keys.shape[1])).ravel()
        keys = unrotated(keys.reshape(-1, *keys.shape[2:]), positions, frequencies, magnitude).reshape(keys.shape)
    return vectors(keys.astype(jnp.float32), values.astype(jnp.float32), groups)


def seal_centers(pools: DeltaPools, x: Array, targets: Array, grid: Grid) -> DeltaPools:
    """Stores the centers of pages x [M, P, A, W]."""
    return put_centers(pools, targets, x[:, :: grid.stride])


def seal_rest(
    pools: DeltaPools, weights: Weights, x: Array, target: Array, table: Array, logical: Array, grid: Grid
) -> DeltaPools:
    """Stores everything else of one page x [P, A, W], with reference to centers as stored."""
    groups, first = x.shape[1], logical * grid.own
    every = take_centers(pools, table, groups)
    every = every.reshape(-1, *every.shape[2:])
    own = take_centers(pools, target, groups)
    ordinals = shortlisted(own.reshape(grid.own, -1), every.reshape(len(every), -1), first, grid)
    code = code_page(weights, grid, x, own, every[ordinals], ordinals, first)
    pools = put_named(pools, target, code.ordinals, code.index)
    return put_latents(pools, target, code.z, grid)
