"""Which centers listed pages need, and which of them each token takes: what kernels are told beside the pages."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.deltakv import Grid
from pallas_kernels.deltakv_pools import DeltaPools, places_of_references, scales_of_centers, take_index


class Named(NamedTuple):
    """Per listed page the Q = Pc + R centers that come with it: its own, then those that it refers to.

    Attributes:
        pages, slots: physical page of each center and its number there; entries that are not listed name page 0.
        scales: of each center, in the order [K, 2], in float32; 0 where nothing is listed. None: centers are not coded.
        taken: for each place of a page the centers that its token takes, as numbers below Q: the tokens that are no
            centers, in order, then the centers, which take themselves.
    """

    pages: Int[Array, "B J Q"]
    slots: Int[Array, "B J Q"]
    scales: Float[Array, "B J Q K2"] | None
    taken: Int[Array, "B J P k"]


def centers_of_lists(
    pools: DeltaPools, page_ids: Int[Array, "B 1 J"], counts: Int[Array, "B 1"], tables: Int[Array, "B S"], grid: Grid
) -> Named:
    """Looks up the centers of listed pages."""
    listed = jnp.arange(page_ids.shape[2]) < counts
    ids = jnp.where(listed, page_ids[:, 0], 0)
    own = jnp.broadcast_to(jnp.arange(grid.own, dtype=jnp.int32), (*ids.shape, grid.own))
    of_own = jnp.broadcast_to(ids[..., None], own.shape)
    referred, at = jax.vmap(lambda pages, table: places_of_references(pools, pages, table, grid))(ids, tables)
    referred = jnp.where(listed[..., None], referred, 0)
    pages, slots = jnp.concatenate([of_own, referred], -1), jnp.concatenate([own, at], -1)
    scales = None
    if pools.center_scales is not None:
        scales = scales_of_centers(pools, pages, slots)
        scales = jnp.where(listed[..., None, None], scales, 0)
    index = jnp.where(listed[..., None, None], take_index(pools, ids, grid), 0) + grid.own
    itself = jnp.broadcast_to(own[..., None], (*own.shape, grid.neighbours))
    return Named(pages, slots, scales, jnp.concatenate([index, itself], axis=2))
