"""Attention of one query per row over its page list: the kernel.

One block of 128 threads serves one part of one row's list for one KV head. Tiles of K and V stream through
a ring of shared-memory stages, one bulk tensor copy per (page, head). Products are 16-row tensor-core
ones: the queries of a KV head fill at most 16 rows, a padded 64-row warpgroup product would spend most of
its softmax on padding. The loop's bounds are data. Softmax is in powers of two.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.mosaic_gpu import tiles
from pallas_kernels.mosaic_gpu.target import SHARED_BYTES, simulator
from pallas_kernels.mosaic_gpu.tiles import HIDDEN, LOG2E, Mma, constant, spread
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
    def measured(cls, op: str, stored: jnp.dtype, shape: Any) -> Config | None:
        """What was measured best on this device for a call like this one."""
        if simulator() is not None:
            return None
        pairs = shape.rows * shape.kv_heads
        found = tuning.lookup(op, stored, shape.head_dim, shape.page, pairs, shape.width * shape.page)
        return None if found is None else cls(**found)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Extents of one call: rows, KV heads of the pool, query blocks per KV head, lists per row, page, head
    dim."""

    rows: int
    kv_heads: int
    parts: int
    lists: int
    width: int
    page: int
    head_dim: int

    @property
    def row_warps(self) -> int:
        """A product's columns come in 32 where one warp holds all 16 rows, in 16 where two hold 32."""
        return 1 if self.head_dim % 32 == 0 else 2

    def default(self, itemsize: int) -> Config:
        """Two blocks per multiprocessor, each with about 100 KB of copies in flight."""
        tile = 64 if self.head_dim <= 128 and self.row_warps == 1 else 32
        stages = max(2, min(6, (100 * 1024) // (2 * tile * self.head_dim * itemsize)))
        blocks = self.rows * self.kv_heads * self.parts
        splits = split_count(blocks, self.width * self.page, tile)
        return Config(tile=tile, stages=stages, splits=splits, least=max(2, min(8, blocks // 16)))

    def candidates(self, itemsize: int) -> list[Config]:
        """The heuristic's configuration first, then others that fit, for measuring."""
        default, rows = self.default(itemsize), 16 * self.row_warps
        others = [
            Config(tile, stages, splits, default.least)
            for tile in (32, 64, 128)
            for stages in (2, 3, 4, 6)
            for splits in sorted({max(1, default.splits // 2), default.splits, 2 * default.splits})
        ]
        fitting = [c for c in others if shared_bytes(c, rows, self.head_dim, itemsize) <= SHARED_BYTES]
        return list(dict.fromkeys([default, *fitting]))


def decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_ids: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    shape: Shape,
    scale: float,
    soft_cap: float | None,
    config: Config,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised parts of the attention of q [B, K * X, M, D] over slots [first, stop) [B, Kl] of the
    lists.

    Returns out [B, K * X, S, M, D], running maximum (in powers of two) and sum [B, K * X, S, M], all
    float32. A part without work has sum 0 and leaves `out` unwritten.
    """
    batch, blocks, rows, head_dim = q.shape
    dtype = q.dtype
    tile, stages, splits = config.tile, config.stages, config.splits
    units = tiles.Units.of(shape.page, tile)
    mma = Mma(dtype, shape.row_warps)
    row_layout = mma.acc.reduce(1)

    def body(
        q_ref,
        k_ref,
        v_ref,
        ids_ref,
        first_ref,
        stop_ref,
        out_ref,
        top_ref,
        total_ref,
        q_tile,
        k_ring,
        v_ring,
        p_tile,
        q_ready,
        k_ready,
        v_ready,
    ):
        part, block, row = lax.axis_index("part"), lax.axis_index("block"), lax.axis_index("row")
        head = lax.div(block, shape.parts)
        of_list = head if shape.lists > 1 else 0
        first, stop = first_ref[row, of_list], stop_ref[row, of_list]
        begin, end, steps = tiles.part_of(part, first, stop, units.unit, units.copies, splits, config.least)

        def fetch(step, slot, pool, ring, ready):
            lookup = functools.partial(tiles.page_of, ids_ref, row, of_list)
            units.fetch(pool, head, lookup, begin + step * units.copies, end - 1, ring.at[slot], ready.at[slot])

        @pl.when(steps > 0)
        def _start():
            plgpu.copy_gmem_to_smem(q_ref.at[row, block], q_tile, q_ready)
            for step in range(stages):

                @pl.when(step < steps)
                def _fill(step=step):
                    fetch(step, step, k_ref, k_ring, k_ready)
                    fetch(step, step, v_ref, v_ring, v_ready)

            plgpu.barrier_wait(q_ready)

        query = plgpu.load(q_tile, layout=mma.lhs)

        def step_over(step, carry):
            acc, top, total = carry
            slot = lax.rem(step, jnp.int32(stages))
            slot_base = (begin + step * units.copies) * units.unit
            tiles.wait(k_ready.at[slot])
            keys = plgpu.load(k_ring.at[slot].transpose((1, 0)), layout=mma.rhs)
            scores = mma.dot(constant((rows, tile), 0.0, mma.acc), query, keys)
            scores = tiles.capped(scores * scale, soft_cap) * LOG2E if soft_cap else scores * (scale * LOG2E)
            at = plgpu.broadcasted_iota(jnp.int32, (rows, tile), 1, layout=mma.acc) + slot_base
            seen = tiles.visible(at, first, stop)
            scores = jnp.where(seen, scores, HIDDEN)
            higher = jnp.maximum(top, scores.max(axis=1))
            decay = jnp.exp2(top - higher)
            weights = jnp.where(seen, jnp.exp2(scores - spread(higher, scores)), 0.0)
            # The sum stays per column until the end: one reduction over warps per list, not per step.
            total = total * spread(decay, total) + weights
            p_tile[...] = weights.astype(dtype)

            @pl.when(step + stages < steps)
            def _next_keys():
                fetch(step + stages, slot, k_ref, k_ring, k_ready)

            acc = acc * spread(decay, acc)
            tiles.wait(v_ready.at[slot])
            values = plgpu.load(v_ring.at[slot], layout=mma.rhs)
            token = plgpu.broadcasted_iota(jnp.int32, (tile, head_dim), 0, layout=mma.rhs) + slot_base
            # Hidden slots may hold NaN, and zero times NaN is NaN.
            values = lax.cond(
                (slot_base < first) | (slot_base + tile > stop),
                lambda v: jnp.where((token >= first) & (token < stop), v, jnp.zeros_like(v)),
                lambda v: v,
                values,
            )
            acc = mma.dot(acc, plgpu.load(p_tile, layout=mma.lhs), values)

            @pl.when(step + stages < steps)
            def _next_values():
                fetch(step + stages, slot, v_ref, v_ring, v_ready)

            return acc, higher, total

        acc, top, total = lax.fori_loop(
            0,
            steps,
            step_over,
            (
                constant((rows, head_dim), 0.0, mma.acc),
                constant((rows,), HIDDEN, row_layout),
                constant((rows, tile), 0.0, mma.acc),
            ),
        )

        @pl.when(steps > 0)
        def _write():
            out_ref[row, block, part] = acc

        top_ref[row, block, part] = top
        total_ref[row, block, part] = total.sum(axis=1)

    ring = plgpu.SMEM((stages, tile, head_dim), dtype, transforms=tiles.swizzled(head_dim, dtype))
    stats = jax.ShapeDtypeStruct((batch, blocks, splits, rows), jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((batch, blocks, splits, rows, head_dim), jnp.float32), stats, stats],
        grid=(splits, blocks, batch),
        grid_names=("part", "block", "row"),
        scratch_types=[
            plgpu.SMEM((rows, head_dim), dtype, transforms=tiles.swizzled(head_dim, dtype)),
            ring,
            ring,
            plgpu.SMEM((rows, tile), dtype, transforms=tiles.swizzled(tile, dtype)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=units.copies, num_barriers=stages),
            plgpu.Barrier(num_arrivals=units.copies, num_barriers=stages),
        ],
        compiler_params=tiles.compiler_params(),
        interpret=simulator(),
        kernel_name="paged_decode_attention",
    )
    return kernel(q, k_pages, v_pages, page_ids, first, stop)


def shared_bytes(config: Config, rows: int, head_dim: int, itemsize: int) -> int:
    """Shared memory of one block, without barriers."""
    return itemsize * (2 * config.stages * config.tile * head_dim + rows * (head_dim + config.tile))
