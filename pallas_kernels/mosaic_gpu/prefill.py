"""Causal attention of query tiles over page lists: the kernel (Hopper).

A block serves 128 query rows (tokens x query heads of one KV head) of one sequence: two warpgroups of 64
rows compute, a third streams pages. Which list slots a row sees is given as a range, so page lists,
causality, windows and padding are one mask, needed only in tiles at an edge.
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
from pallas_kernels.mosaic_gpu.target import simulator
from pallas_kernels.mosaic_gpu.tiles import HIDDEN, LOG2E, constant, spread

ROWS = 64
WARPGROUPS = 2
CLEANED = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """`tile` tokens of the list per step, `stages` of the ring."""

    tile: int
    stages: int

    @classmethod
    def default(cls, head_dim: int, itemsize: int) -> Config:
        """As many stages as fit beside the queries of both warpgroups."""
        tile = 128 if head_dim <= 128 else 64
        room = 220 * 1024 - WARPGROUPS * ROWS * head_dim * itemsize
        return cls(tile=tile, stages=max(2, min(4, room // (2 * tile * head_dim * itemsize))))


def shared_bytes(config: Config, head_dim: int, itemsize: int) -> int:
    """Shared memory of one block, without barriers."""
    return itemsize * head_dim * (WARPGROUPS * ROWS + 2 * config.stages * config.tile)


def prefill(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_ids: jax.Array,
    row_of: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    bounds: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    config: Config,
) -> tuple[jax.Array, jax.Array]:
    """Attention of query tiles q [X, K, M, D], each of row `row_of` [X] of the lists, M = 128.

    Row m of a tile sees slots [first, stop) [X, Kl, M]; `bounds` [X, Kl, 4] hold over the rows that count:
    the lowest first, the highest stop (slots outside of these two may hold NaN), the highest first, the
    lowest stop (all such rows see the slots inside of these two). Returns out [X, K, M, D] and log-sum-exp
    [X, K, M] float32.
    """
    count, kv_heads, rows, head_dim = q.shape
    lists, page = page_ids.shape[1], k_pages.shape[2]
    dtype, tile, stages = q.dtype, config.tile, config.stages
    units = tiles.Units.of(page, tile)
    wgmma = plgpu.Layout.WGMMA
    row_layout = wgmma.reduce(1)
    swizzled = tiles.swizzled(head_dim, dtype)

    def body(
        q_ref,
        k_ref,
        v_ref,
        ids_ref,
        row_ref,
        first_ref,
        stop_ref,
        bounds_ref,
        out_ref,
        lse_ref,
        q_tiles,
        k_ring,
        v_ring,
        q_ready,
        k_ready,
        v_ready,
        v_dirty,
        k_free,
        v_free,
        p_tiles=None,
    ):
        index, head = lax.axis_index("tile"), lax.axis_index("head")
        group = lax.axis_index("warpgroup")
        of_list = head if lists > 1 else 0
        lowest, highest = bounds_ref[index, of_list, 0], bounds_ref[index, of_list, 1]
        inner, outer = bounds_ref[index, of_list, 2], bounds_ref[index, of_list, 3]
        begin = lax.div(lowest, tile) * tile
        steps = jnp.where(highest > lowest, lax.div(highest - begin + tile - 1, tile), 0)

        @pl.when(group == WARPGROUPS)
        def _stream():
            plgpu.set_max_registers(72, action="decrease")
            row = row_ref[index]
            last_unit = lax.div(highest - 1, units.unit)

            def fetch(step, slot, pool, ring, ready):
                first_unit = lax.div(begin, units.unit) + step * units.copies
                lookup = functools.partial(tiles.page_of, ids_ref, row, of_list)
                units.fetch(pool, head, lookup, first_unit, last_unit, ring.at[slot], ready)

            def clean(slot, base):
                # Zero times NaN is NaN, and the products read values straight from shared memory.
                def rows_of(r, _):
                    part = v_ring.at[slot, pl.ds(r * CLEANED, CLEANED)]
                    copied = plgpu.Layout.SMEM_GMEM_COPY((CLEANED, head_dim), dtype, swizzled[1].swizzle)
                    values = plgpu.load(part, layout=copied)
                    at = plgpu.broadcasted_iota(jnp.int32, (CLEANED, head_dim), 0, layout=copied) + base + r * CLEANED
                    part[...] = jnp.where((at >= lowest) & (at < highest), values, jnp.zeros_like(values))

                lax.fori_loop(0, tile // CLEANED, rows_of, None)
                plgpu.commit_smem()

            def stream(step, _):
                slot = lax.rem(step, jnp.int32(stages))

                @pl.when(step >= stages)
                def _reuse():
                    plgpu.barrier_wait(k_free.at[slot])

                fetch(step, slot, k_ref, k_ring, k_ready.at[slot])

                @pl.when(step >= stages)
                def _reuse_values():
                    plgpu.barrier_wait(v_free.at[slot])

                base = begin + step * tile
                dirty = (base < lowest) | (base + tile > highest)

                @pl.when(jnp.logical_not(dirty))
                def _plain():
                    fetch(step, slot, v_ref, v_ring, v_ready.at[slot])

                @pl.when(dirty)
                def _edge():
                    fetch(step, slot, v_ref, v_ring, v_dirty)
                    plgpu.barrier_wait(v_dirty)
                    clean(slot, base)
                    for _ in range(units.copies):
                        plgpu.barrier_arrive(v_ready.at[slot])

            lax.fori_loop(0, steps, stream, None)

        @pl.when(group < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(216, action="increase")
            mine = pl.ds(group * ROWS, ROWS)
            query = q_tiles.at[group]
            plgpu.copy_gmem_to_smem(q_ref.at[index, head, mine], query, q_ready.at[group])
            first = plgpu.load(first_ref.at[index, of_list, mine], layout=row_layout, optimized=False)
            stop = plgpu.load(stop_ref.at[index, of_list, mine], layout=row_layout, optimized=False)
            plgpu.barrier_wait(q_ready.at[group])

            def step_over(step, carry):
                acc, top, total = carry
                slot = lax.rem(step, jnp.int32(stages))
                base = begin + step * tile
                tiles.wait(k_ready.at[slot])

                def product(scores_ref):
                    plgpu.wgmma(scores_ref, query, k_ring.at[slot].transpose((1, 0)))
                    return scores_ref[...]

                scores = pl.run_scoped(product, plgpu.ACC((ROWS, tile), jnp.float32))
                reused = step + stages < steps
                pl.when(reused)(lambda: plgpu.barrier_arrive(k_free.at[slot]))
                scores = tiles.capped(scores * scale, soft_cap) * LOG2E if soft_cap else scores * (scale * LOG2E)

                def mask(scores):
                    at = plgpu.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=wgmma) + base
                    return jnp.where(tiles.visible(at, spread(first, at), spread(stop, at)), scores, HIDDEN)

                scores = lax.cond((base < inner) | (base + tile > outer), mask, lambda s: s, scores)
                higher = jnp.maximum(top, scores.max(axis=1))
                # A row that has seen nothing yet must not take hidden slots for equals of its maximum.
                shift = jnp.maximum(higher, 0.5 * HIDDEN)
                decay = jnp.exp2(top - higher)
                weights = jnp.exp2(scores - spread(shift, scores))
                total = total * decay + weights.sum(axis=1)
                acc = acc * spread(decay, acc)
                tiles.wait(v_ready.at[slot])
                acc = _accumulate(acc, weights.astype(dtype), v_ring.at[slot], p_tiles and p_tiles.at[group])
                pl.when(reused)(lambda: plgpu.barrier_arrive(v_free.at[slot]))
                return acc, higher, total

            acc, top, total = lax.fori_loop(
                0,
                steps,
                step_over,
                (
                    constant((ROWS, head_dim), 0.0, wgmma),
                    constant((ROWS,), HIDDEN, row_layout),
                    constant((ROWS,), 0.0, row_layout),
                ),
            )
            sees = total > 0
            total = jnp.where(sees, total, 1.0)
            lse_ref[index, head, mine] = jnp.where(sees, (top + jnp.log2(total)) * (1 / LOG2E), HIDDEN)
            query[...] = (acc / spread(total, acc)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(query, out_ref.at[index, head, mine])
            plgpu.wait_smem_to_gmem(0)

    ring = plgpu.SMEM((stages, tile, head_dim), dtype, transforms=swizzled)
    ready = plgpu.Barrier(num_arrivals=units.copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    scratch = [
        plgpu.SMEM((WARPGROUPS, ROWS, head_dim), dtype, transforms=swizzled),
        ring,
        ring,
        plgpu.Barrier(num_barriers=WARPGROUPS),
        ready,
        ready,
        plgpu.Barrier(num_arrivals=units.copies),
        free,
        free,
    ]
    if simulator() is not None:
        scratch.append(plgpu.SMEM((WARPGROUPS, ROWS, tile), dtype, transforms=tiles.swizzled(tile, dtype)))
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((count, kv_heads, rows), jnp.float32),
        ],
        grid=(kv_heads, count),
        grid_names=("head", "tile"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=tiles.compiler_params(),
        interpret=simulator(),
        kernel_name="paged_prefill_attention",
    )
    return kernel(q, k_pages, v_pages, page_ids, row_of, first, stop, bounds)


def _accumulate(acc: jax.Array, weights: jax.Array, values, weights_tile) -> jax.Array:
    """acc + weights @ values, weights in registers, values in shared memory."""
    if simulator() is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))
    # The simulator takes both operands from shared memory and starts accumulators at zero.
    weights_tile[...] = weights
    plgpu.commit_smem()

    def product(ref):
        plgpu.wgmma(ref, weights_tile, values)
        return ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))
