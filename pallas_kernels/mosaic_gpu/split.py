"""Decode attention over parts of page lists, dense or coded: how it is cut, started and launched.

One block of 128 threads serves one part of one row's list for one KV head; `work.merge` joins the parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.mosaic_gpu import tiles
from pallas_kernels.mosaic_gpu.target import simulator
from pallas_kernels.mosaic_gpu.work import split_count


@dataclasses.dataclass(frozen=True)
class Config:
    """`tile` tokens per step, `stages` of the ring, `splits` parts of each list, at least `least` tiles
    per part."""

    tile: int
    stages: int
    splits: int
    least: int

    @classmethod
    def measured(cls, op: str, stored: jnp.dtype, lists: Lists) -> Config | None:
        """What was measured best on this device for a call like this one."""
        if simulator() is not None:
            return None
        pairs = lists.rows * lists.kv_heads
        found = tuning.lookup(op, stored, lists.head_dim, lists.page, pairs, lists.width * lists.page)
        return None if found is None else cls(**found)


@dataclasses.dataclass(frozen=True)
class Lists:
    """Extents of one call: rows, KV heads of the pool, query blocks per KV head, lists per row, entries of a list,
    tokens of a page, head dim."""

    rows: int
    kv_heads: int
    parts: int
    lists: int
    width: int
    page: int
    head_dim: int

    def config(self, tile: int, stages: int) -> Config:
        """These tiles and stages, and as many parts as fill the device."""
        blocks = self.rows * self.kv_heads * self.parts
        splits = split_count(blocks, self.width * self.page, tile)
        return Config(tile=tile, stages=stages, splits=splits, least=max(2, min(8, blocks // 16)))


def candidates(
    default: Config, sizes: Iterable[int], stages: Iterable[int], fits: Callable[[Config], bool]
) -> list[Config]:
    """The default configuration first, then others that fit, for measuring."""
    splits = sorted({max(1, default.splits // 2), default.splits, 2 * default.splits})
    others = [Config(tile, count, cut, default.least) for tile in sizes for count in stages for cut in splits]
    return list(dict.fromkeys([default, *filter(fits, others)]))


@dataclasses.dataclass(frozen=True)
class Part:
    """What a block serves: units [begin, end) of list `of_list` of a row in `steps` steps, for `block` of the query
    heads, which reads KV head `head`. It sees slots [first, stop)."""

    part: jax.Array
    block: jax.Array
    row: jax.Array
    head: jax.Array
    of_list: jax.Array | int
    first: jax.Array
    stop: jax.Array
    begin: jax.Array
    end: jax.Array
    steps: jax.Array

    @classmethod
    def here(cls, first_ref, stop_ref, lists: Lists, config: Config, unit: int, copies: int) -> Part:
        """That of the running block; steps are `copies` units of `unit` tokens."""
        part, block, row = (lax.axis_index(name) for name in ("part", "block", "row"))
        head = lax.div(block, lists.parts)
        of_list = head if lists.lists > 1 else 0
        first, stop = first_ref[row, of_list], stop_ref[row, of_list]
        cut = tiles.part_of(part, first, stop, unit, copies, config.splits, config.least)
        return cls(part, block, row, head, of_list, first, stop, *cut)

    def start(self, q_ref, q_tile, q_ready, stages: int, fetch: Callable[[int, int], None]) -> None:
        """Brings the queries and starts the copies of the first steps, `fetch(step, slot)` each."""

        @pl.when(self.steps > 0)
        def _():
            plgpu.copy_gmem_to_smem(q_ref.at[self.row, self.block], q_tile, q_ready)
            for step in range(stages):
                pl.when(step < self.steps)(lambda step=step: fetch(step, step))
            plgpu.barrier_wait(q_ready)

    def write(self, out_ref, top_ref, total_ref, acc: Callable[[], jax.Array], top, total) -> None:
        """Gives out the results of the part; without steps `acc` is not asked."""

        @pl.when(self.steps > 0)
        def _():
            out_ref[self.row, self.block, self.part] = acc()

        top_ref[self.row, self.block, self.part] = top
        total_ref[self.row, self.block, self.part] = total.sum(axis=1)


def launch(
    body: Callable[..., None],
    q: jax.Array,
    operands: Sequence[jax.Array],
    splits: int,
    scratch: Sequence[Any],
    name: str,
    out: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs `body` for every part of the lists of every row and block of query heads of q [B, K * X, M, D].

    Returns out [B, K * X, S, M, D], or with `out` as its last two extents, running maximum (in powers of two) and sum
    [B, K * X, S, M], all float32. A part without work has sum 0 and leaves `out` unwritten.
    """
    batch, blocks, rows, head_dim = q.shape
    stats = jax.ShapeDtypeStruct((batch, blocks, splits, rows), jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((batch, blocks, splits, *(out or (rows, head_dim))), jnp.float32), stats, stats],
        grid=(splits, blocks, batch),
        grid_names=("part", "block", "row"),
        scratch_types=[
            plgpu.SMEM((rows, head_dim), q.dtype, transforms=tiles.swizzled(head_dim, q.dtype)),
            plgpu.Barrier(),
            *scratch,
        ],
        compiler_params=tiles.compiler_params(),
        interpret=simulator(),
        kernel_name=name,
    )
    return kernel(q, *operands)
