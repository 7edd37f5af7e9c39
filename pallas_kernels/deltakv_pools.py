"""How DeltaKV pages lie in pools, written and read page by page."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import codes
from pallas_kernels.checks import require, shape_of
from pallas_kernels.deltakv import Grid, base_of, expand, filled, whole_page
from pallas_kernels.layouts import LANES

SCALE = jnp.bfloat16


class DeltaPools(NamedTuple):
    """One layer's sealed pages. Page 0 absorbs padding writes.

    Attributes:
        centers: int8, or floats where centers are stored as they are; [N, Pc, K, 2D], K then V of a head:
            a center of all heads lies together, as those that read it need it.
        center_scales: of each center, head and K or V, in the order [Pc, K, 2], or None.
        latents: [N, A, rows, C]: int4 codes two tokens to a byte as in `pallas_kernels.codes`, int8 codes, or floats.
            On GPUs and TPUs there are rows for as many tokens as a page has: they copy whole tiles of 8 rows.
        latent_scales: per channel the scale, and in int4 the zero; None for floats.
        references: uint16 ordinals of centers in the sequence: position / stride.
        index: uint8 numbers of references, in the order [O, k] of the tokens that are no centers.

    What is said of a page (center_scales, references, index) is a row of 128 lanes or a multiple on a TPU, which would
    lay out narrower ones anew around every call.
    """

    centers: Shaped[Array, "N Pc K D2"]
    center_scales: Float[Array, "N X"] | None
    latents: Shaped[Array, "N A O C"]
    latent_scales: Float[Array, "N A z C"] | None
    references: Shaped[Array, "N Y"]
    index: Shaped[Array, "N Z"]


def shapes(
    grid: Grid,
    num_pages: int,
    kv_heads: int,
    head_dim: int,
    groups: int,
    latent: int,
    dtype: jnp.dtype,
    platform: str = "cpu",
) -> dict[str, tuple[tuple[int, ...], jnp.dtype] | None]:
    """Shape and dtype of every pool on a platform; `latent` is C, the width of a head group's latent."""
    coded, zeros = grid.latents != "none", 2 if grid.latents == "int4" else 1
    kinds = {"int4": jnp.uint8, "int8": jnp.int8, "none": dtype}
    scaled = grid.centers == "int8"
    rows = grid.rows if platform == "cpu" else grid.padded_rows
    lanes = LANES if platform == "tpu" else 1

    def side(count: int, dtype: jnp.dtype) -> tuple[tuple[int, ...], jnp.dtype]:
        return (num_pages, -(-count // lanes) * lanes), dtype

    return {
        "centers": ((num_pages, grid.own, kv_heads, 2 * head_dim), kinds[grid.centers]),
        "center_scales": side(grid.own * kv_heads * 2, SCALE) if scaled else None,
        "latents": ((num_pages, groups, rows, latent), kinds[grid.latents]),
        "latent_scales": ((num_pages, groups, zeros, latent), SCALE) if coded else None,
        "references": side(grid.references, jnp.uint16),
        "index": side(grid.others * grid.neighbours, jnp.uint8),
    }


def empty(*sizes: object) -> DeltaPools:
    """Pools of `shapes` full of zeros: what the dump page holds must be finite."""
    return DeltaPools(**{name: None if one is None else jnp.zeros(*one) for name, one in shapes(*sizes).items()})


def check(pools: DeltaPools, grid: Grid, head_dim: int) -> tuple[int, int]:
    """Requires pools that fit the grid; returns (K, A)."""
    pages, _, kv_heads = pools.centers.shape[:3]
    groups, latent = pools.latents.shape[1], pools.latents.shape[3]
    sizes = (grid, pages, kv_heads, head_dim, groups, latent, pools.centers.dtype)
    laid = lambda of: all(getattr(pools, name).shape == of[name][0] for name in ("latents", "references"))  # noqa: E731
    laid_out = [shapes(*sizes, platform) for platform in ("cpu", "gpu", "tpu")]
    expected = next(filter(laid, laid_out), laid_out[0])
    for name, wanted in expected.items():
        pool = getattr(pools, name)
        require((pool is None) == (wanted is None), f"{name} must be {'None' if wanted is None else 'an array'}")
        if wanted is not None:
            shape_of(name, pool, wanted[0], "N ...")
            fits = pool.dtype == wanted[1] or (wanted[1] == pools.centers.dtype and name == "latents")
            require(fits, f"{name} must be {jnp.dtype(wanted[1]).name}; got {pool.dtype}")
    require(kv_heads % groups == 0, f"head groups must divide the KV heads; got {groups} and {kv_heads}")
    return kv_heads, groups


def put_centers(pools: DeltaPools, targets: Int[Array, " M"], x: Float[Array, "M Pc A W"]) -> DeltaPools:
    """Stores the centers of pages."""
    count, own = x.shape[:2]
    heads, width = pools.centers.shape[2:]
    parts = x.reshape(count, own, heads, 2, width // 2).astype(jnp.float32)
    if pools.center_scales is None:
        centers = parts.reshape(count, own, heads, width).astype(pools.centers.dtype)
        return pools._replace(centers=pools.centers.at[targets].set(centers))
    coded, scale, _ = codes.encode(parts, "int8", -1, SCALE)
    return pools._replace(
        centers=pools.centers.at[targets].set(coded.reshape(count, own, heads, width)),
        center_scales=_put_sides(pools.center_scales, targets, scale),
    )


def take_centers(pools: DeltaPools, pages: Int[Array, "*S"], groups: int) -> Float[Array, "*S Pc A W"]:
    """Centers of pages as stored, in float32."""
    found = pools.centers[pages].astype(jnp.float32)
    parts = found.reshape(*found.shape[:-1], 2, -1)
    if pools.center_scales is not None:
        parts = parts * take_scales(pools, pages)[..., None]
    return parts.reshape(*found.shape[:-2], groups, -1)


def take_scales(pools: DeltaPools, pages: Int[Array, "*S"]) -> Float[Array, "*S Pc K 2"]:
    """Scales of the centers of pages, in float32."""
    _, own, kv_heads, _ = pools.centers.shape
    sides = pools.center_scales[pages][..., : own * kv_heads * 2]
    return sides.reshape(*pages.shape, own, kv_heads, 2).astype(jnp.float32)


def scales_of_centers(
    pools: DeltaPools, pages: Int[Array, "*S"], slots: Int[Array, "*S"]
) -> Float[Array, "*S K2"]:
    """Scales of the centers with these numbers among those of pages, in the order [K, 2], in float32."""
    sides, count = pools.center_scales[pages], 2 * pools.centers.shape[2]
    found = sides[..., :count]
    for slot in range(1, pools.centers.shape[1]):
        found = jnp.where(slots[..., None] == slot, sides[..., slot * count : (slot + 1) * count], found)
    return found.astype(jnp.float32)


def take_index(pools: DeltaPools, pages: Int[Array, "*S"], grid: Grid) -> Int[Array, "*S O k"]:
    """Which references the tokens of pages take that are no centers."""
    index = pools.index[pages][..., : grid.others * grid.neighbours]
    return index.reshape(*pages.shape, grid.others, grid.neighbours).astype(jnp.int32)


def put_named(
    pools: DeltaPools, target: Int[Array, ""], ordinals: Int[Array, " R"], index: Int[Array, "O k"]
) -> DeltaPools:
    """Stores what one page refers to."""
    return pools._replace(
        references=_put_sides(pools.references, target, ordinals), index=_put_sides(pools.index, target, index)
    )


def _put_sides(pool: Array, targets: Int[Array, "*M"], sides: Array) -> Array:
    """Stores what is said of pages, in any shape, as rows of a pool."""
    flat = sides.reshape(*targets.shape, -1).astype(pool.dtype)
    spare = pool.shape[1] - flat.shape[-1]
    return pool.at[targets].set(jnp.pad(flat, ((0, 0),) * (flat.ndim - 1) + ((0, spare),)))


def take_references(
    pools: DeltaPools, pages: Int[Array, "*S"], table: Int[Array, " L"], groups: int, grid: Grid
) -> Float[Array, "*S R A W"]:
    """Centers that pages of a sequence with this table of physical pages refer to."""
    holders, slots = places_of_references(pools, pages, table, grid)
    found = pools.centers[holders, slots]
    parts = found.astype(jnp.float32).reshape(*found.shape[:-1], 2, -1)
    if pools.center_scales is not None:
        parts = parts * scales_of_centers(pools, holders, slots).reshape(*parts.shape[:-1], 1)
    return parts.reshape(*holders.shape, groups, -1)


def places_of_references(
    pools: DeltaPools, pages: Int[Array, "*S"], table: Int[Array, " L"], grid: Grid
) -> tuple[Int[Array, "*S R"], Int[Array, "*S R"]]:
    """Physical page of each center that pages of a sequence refer to, and its number among those of that page."""
    ordinals = pools.references[pages][..., : grid.references].astype(jnp.int32)
    return table[ordinals // grid.own], ordinals % grid.own


def put_latents(pools: DeltaPools, target: Int[Array, ""], z: Float[Array, "O A C"], grid: Grid) -> DeltaPools:
    """Stores the latents of one page."""
    z, rows = jnp.moveaxis(z, -3, -2), pools.latents.shape[2]
    if grid.latents == "none":
        z = filled(z.astype(pools.latents.dtype), rows)
        return pools._replace(latents=pools.latents.at[target].set(z))
    coded, scale, zero = codes.encode(z, grid.latents, -2, SCALE)
    coded = filled(coded, rows) if zero is None else codes.pack(filled(coded, 2 * rows))
    sides = jnp.stack([scale] if zero is None else [scale, zero], axis=-2)
    return pools._replace(
        latents=pools.latents.at[target].set(coded), latent_scales=pools.latent_scales.at[target].set(sides)
    )


def take_latents(pools: DeltaPools, pages: Int[Array, "*S"], grid: Grid) -> Float[Array, "*S O A C"]:
    """Latents of pages in float32."""
    stored = pools.latents[pages]
    if grid.latents == "none":
        return jnp.moveaxis(stored.astype(jnp.float32)[..., : grid.others, :], -3, -2)
    sides = pools.latent_scales[pages]
    zero = sides[..., 1, :] if grid.latents == "int4" else None
    values = codes.decode(stored, grid.latents, -2, sides[..., 0, :], zero)
    return jnp.moveaxis(values[..., : grid.others, :], -3, -2)


def base_and_latents(
    pools: DeltaPools, pages: Int[Array, " J"], table: Int[Array, " L"], grid: Grid
) -> tuple[Float[Array, "J P A W"], Float[Array, "J P A C"]]:
    """b and z of every token of pages: a center is its own base, and its latent is zero."""
    groups = pools.latents.shape[1]
    own, z = take_centers(pools, pages, groups), take_latents(pools, pages, grid)
    references = take_references(pools, pages, table, groups, grid)
    bases = base_of(references, take_index(pools, pages, grid))
    nothing = jnp.zeros((len(pages), grid.own, *z.shape[2:]))
    return whole_page(own, bases, grid, 1), whole_page(nothing, z, grid, 1)


def read_pages(
    pools: DeltaPools, weights: dict[str, Array], pages: Int[Array, " J"], table: Int[Array, " L"], grid: Grid
) -> Float[Array, "J P A W"]:
    """Tokens of pages, keys not rotated, in float32."""
    base, z = base_and_latents(pools, pages, table, grid)
    return base + expand(weights, z)
