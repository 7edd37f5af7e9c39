"""Small pieces that the kernels are built from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu.target import require, simulator

HIDDEN = -1e30
LOG2E = math.log2(math.e)


def swizzled(columns: int, dtype: jnp.dtype) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Shared-memory layout of a tile with rows of `columns` elements: the widest swizzle that divides a
    row."""
    width = columns * jnp.dtype(dtype).itemsize
    swizzle = next((s for s in (128, 64, 32) if width % s == 0), None)
    require(swizzle is not None, f"rows of {width} bytes fit no shared-memory swizzle (multiples of 32 bytes)")
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)


def compiler_params() -> plgpu.CompilerParams:
    """Compiler parameters of every kernel here: layouts inferred, fast exponentials."""
    return plgpu.CompilerParams(
        approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=2048
    )


@dataclasses.dataclass(frozen=True)
class Mma:
    """Layouts of a 16-bit matrix product whose rows are split over `row_warps` of the four warps, its
    columns over the others."""

    dtype: jnp.dtype
    row_warps: int

    @property
    def rows(self) -> int:
        return 16 * self.row_warps

    @property
    def columns(self) -> int:
        """The number of columns must be a multiple of this."""
        return 8 * (4 // self.row_warps)

    @property
    def lhs(self):
        return plgpu.Layout.MMA_LHS(self.dtype, m_warps=self.row_warps)

    @property
    def rhs(self):
        return plgpu.Layout.MMA_RHS(self.dtype, m_warps=self.row_warps)

    @property
    def acc(self):
        return plgpu.Layout.MMA_ACC(self.dtype, m_warps=self.row_warps)

    def dot(self, acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """acc + a @ b."""
        if simulator() is not None:  # the simulator knows arrays, not warp-level products
            return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
        return plgpu.mma(acc, a, b)


def constant(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    """A float32 register tile of one value in a given layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def spread(rows: jax.Array, like: jax.Array) -> jax.Array:
    """One value per row, repeated over the columns of `like`."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def placed(vector: jax.Array, shape: tuple[int, int], axis: int, layout) -> jax.Array:
    """A vector along `axis` repeated over the other one, in a given layout."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [axis]), layout)


def wait(barrier) -> None:
    """Waits for the copies that report to `barrier`."""
    plgpu.barrier_wait(barrier)


def page_of(page_ids, row: jax.Array, head: jax.Array, entry: jax.Array) -> jax.Array:
    """Physical id of a list entry."""
    return page_ids[row, head, entry]


@dataclasses.dataclass(frozen=True)
class Units:
    """How a step reads a list: `copies` units, a unit being a page of `page` tokens or a piece of one."""

    page: int
    unit: int
    copies: int

    @classmethod
    def of(cls, page: int, tile: int) -> Units:
        """Those of steps of `tile` tokens."""
        return cls(page, min(page, tile), tile // min(page, tile))

    def fetch(self, pool, head, lookup: Callable, first: jax.Array, last: jax.Array, ring, ready) -> None:
        """Starts the copies of the units from `first` on into `ring` [copies * unit, D].

        Past the unit `last` that one comes again: what is not listed is never looked up. `lookup` gives the physical
        id of a list entry.
        """
        per_page = self.page // self.unit
        for i in range(self.copies):
            at = jnp.minimum(first + i, last)
            source = pool.at[lookup(lax.div(at, per_page)), head]
            if per_page > 1:
                source = source.at[pl.ds(lax.rem(at, per_page) * self.unit, self.unit)]
            plgpu.copy_gmem_to_smem(source, ring.at[pl.ds(i * self.unit, self.unit)], ready)


def part_of(
    part: jax.Array, first: jax.Array, stop: jax.Array, unit: int, copies: int, splits: int, least: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Units [begin, end) that one of `splits` parts of a list takes, and its steps.

    The list's units of slots [first, stop) are cut into equal runs of whole steps of `copies` units, of at least
    `least` steps.
    """
    begin, end = lax.div(first, unit), lax.div(stop + unit - 1, unit)
    run = lax.div(lax.div(end - begin + splits - 1, splits) + copies - 1, copies)
    run = jnp.maximum(run, least) * copies
    begin += part * run
    end = jnp.minimum(begin + run, end)
    return begin, end, jnp.maximum(lax.div(end - begin + copies - 1, copies), 0)


def visible(slot: jax.Array, first: jax.Array, stop: jax.Array) -> jax.Array:
    """Which list slots a query sees."""
    return (slot >= first) & (slot < stop)


def capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """cap * tanh(scores / cap), through the exponential, whose fast form is exact enough for both ends."""
    if soft_cap is None:
        return scores
    return soft_cap - (2 * soft_cap) / (1 + jnp.exp2(scores * (2 * LOG2E / soft_cap)))
