"""Attention of one query per row over its page list: the kernel.

One block of 128 threads serves one part of one row's list for one KV head. Tiles of K and V stream through
a ring of shared-memory stages, one bulk tensor copy per (page, head). Products are 16-row tensor-core
ones: the queries of a KV head fill at most 16 rows, a padded 64-row warpgroup product would spend most of
its softmax on padding. The loop's bounds are data. Softmax is in powers of two.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tiles
from pallas_kernels.mosaic_gpu.split import Config, Lists, Part, candidates, launch
from pallas_kernels.mosaic_gpu.target import SHARED_BYTES
from pallas_kernels.mosaic_gpu.tiles import HIDDEN, LOG2E, Mma, constant, spread


@dataclasses.dataclass(frozen=True)
class Shape(Lists):
    """Extents of one call over dense pages."""

    @property
    def row_warps(self) -> int:
        """A product's columns come in 32 where one warp holds all 16 rows, in 16 where two hold 32."""
        return 1 if self.head_dim % 32 == 0 else 2

    def shared_bytes(self, config: Config, itemsize: int) -> int:
        """Shared memory of one block, without barriers."""
        tile, rows = config.tile, 16 * self.row_warps
        return itemsize * (2 * config.stages * tile * self.head_dim + rows * (self.head_dim + tile))

    def default(self, itemsize: int) -> Config:
        """Two blocks per multiprocessor, each with about 100 KB of copies in flight."""
        tile = 64 if self.head_dim <= 128 and self.row_warps == 1 else 32
        return self.config(tile, max(2, min(6, (100 * 1024) // (2 * tile * self.head_dim * itemsize))))

    def candidates(self, itemsize: int) -> list[Config]:
        """The heuristic's configuration first, then others that fit, for measuring."""
        fits = lambda config: self.shared_bytes(config, itemsize) <= SHARED_BYTES  # noqa: E731
        return candidates(self.default(itemsize), (32, 64, 128), (2, 3, 4, 6), fits)


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

    Results are those of `split.launch`.
    """
    _, _, rows, head_dim = q.shape
    dtype, tile, stages = q.dtype, config.tile, config.stages
    units = tiles.Units.of(shape.page, tile)
    mma = Mma(dtype, shape.row_warps)
    row_layout = mma.acc.reduce(1)

    def body(
        q_ref, k_ref, v_ref, ids_ref, first_ref, stop_ref, out_ref, top_ref, total_ref,
        q_tile, q_ready, k_ring, v_ring, p_tile, k_ready, v_ready,
    ):  # fmt: skip
        here = Part.here(first_ref, stop_ref, shape, config, units.unit, units.copies)
        first, stop, steps = here.first, here.stop, here.steps

        def fetch(step, slot, pool, ring, ready):
            lookup = functools.partial(tiles.page_of, ids_ref, here.row, here.of_list)
            at = here.begin + step * units.copies
            units.fetch(pool, here.head, lookup, at, here.end - 1, ring.at[slot], ready.at[slot])

        def fetch_both(step, slot):
            fetch(step, slot, k_ref, k_ring, k_ready)
            fetch(step, slot, v_ref, v_ring, v_ready)

        here.start(q_ref, q_tile, q_ready, stages, fetch_both)
        query = plgpu.load(q_tile, layout=mma.lhs)

        def step_over(step, carry):
            acc, top, total = carry
            slot = lax.rem(step, jnp.int32(stages))
            slot_base = (here.begin + step * units.copies) * units.unit
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

        here.write(out_ref, top_ref, total_ref, lambda: acc, top, total)

    swizzled = tiles.swizzled(head_dim, dtype)
    ring = plgpu.SMEM((stages, tile, head_dim), dtype, transforms=swizzled)
    ready = plgpu.Barrier(num_arrivals=units.copies, num_barriers=stages)
    scratch = [ring, ring, plgpu.SMEM((rows, tile), dtype, transforms=tiles.swizzled(tile, dtype)), ready, ready]
    operands = (k_pages, v_pages, page_ids, first, stop)
    return launch(body, q, operands, config.splits, scratch, "paged_decode_attention")
