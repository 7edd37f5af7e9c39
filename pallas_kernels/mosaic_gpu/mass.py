"""Probability that queries give to the slots of their rows' page lists: the kernel.

One block of 128 threads serves one part of one row's list for one KV head. Tiles of keys stream through a ring as in
`decode`; the queries of the row pass over each of them, again and again where a chunk has many.
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
from pallas_kernels.mosaic_gpu.tiles import LOG2E, Mma, constant, spread
from pallas_kernels.mosaic_gpu.work import split_count

RING_BYTES = 80 * 1024
LEAST = 4  # steps of a part


@dataclasses.dataclass(frozen=True)
class Shape:
    """How one call is cut.

    A query tile has `rounds` x `rows` queries; the largest of those in the same row of each round counts, then rows
    add up (or, with `largest`, the largest of them counts). A step takes `tile` slots. `per_page`: it is one page,
    whose slots add up before anything else. `one_tile`: every row of the lists has a single query tile.
    """

    kv_heads: int
    lists: int
    width: int
    page: int
    head_dim: int
    rounds: int
    queries: int  # of a round
    largest: bool
    per_page: bool
    one_tile: bool

    @property
    def tile(self) -> int:
        return self.page if self.per_page else 64

    @property
    def row_warps(self) -> int:
        """Columns of a product come in 32 where one warp holds all 16 rows, in 16 where two hold 32."""
        return 1 if self.tile % 32 == 0 else 2

    @property
    def rows(self) -> int:
        """Queries of a round and what fills whole products."""
        return -(-self.queries // (16 * self.row_warps)) * 16 * self.row_warps

    @property
    def stages(self) -> int:
        """Steps whose keys are in flight or in use."""
        return max(2, min(6, RING_BYTES // (2 * self.tile * self.head_dim)))

    @property
    def query_stages(self) -> int:
        return 1 if self.one_tile else 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block, without barriers."""
        queries = self.query_stages * self.rounds * self.rows
        return 2 * self.head_dim * (self.stages * self.tile + queries)


def mass(
    q: jax.Array,
    norms: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    tile_of: jax.Array,
    tile_count: jax.Array,
    k_pages: jax.Array,
    page_ids: jax.Array,
    lowest: jax.Array,
    highest: jax.Array,
    *,
    shape: Shape,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """Mass under query tiles q [X, K, rounds * M, D] with log-sum-exp `norms` in powers of two [X, K, rounds * M].

    Row m of a tile sees slots [first, stop) [X, Kl, M]. Row b of the lists has `tile_count[b]` tiles from `tile_of[b]`
    on, which see slots within [lowest, highest) [B, Kl]. Returns float32 [B, K, J * P], or with `per_page` [B, K, J, C]
    whose C numbers add up (or have their largest taken); what no query of a row may see is unwritten.
    """
    batch, head_dim, tile, stages = page_ids.shape[0], shape.head_dim, shape.tile, shape.stages
    units = tiles.Units.of(shape.page, tile)
    slots = shape.width * shape.page
    splits = split_count(batch * shape.kv_heads, slots, tile)
    mma = Mma(q.dtype, shape.row_warps)
    by_row, at_once = mma.acc.reduce(1), mma.rows

    def body(
        q_ref, norms_ref, first_ref, stop_ref, tile_ref, count_ref, k_ref, ids_ref, lowest_ref, highest_ref,
        out_ref, q_ring, k_ring, q_ready, k_ready,
    ):  # fmt: skip
        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        of_list = head if shape.lists > 1 else 0
        begin, end, steps = tiles.part_of(
            part, lowest_ref[row, of_list], highest_ref[row, of_list], units.unit, units.copies, splits, LEAST
        )
        first_tile, count = tile_ref[row], 1 if shape.one_tile else count_ref[row]

        def fetch(step, slot):
            lookup = functools.partial(tiles.page_of, ids_ref, row, of_list)
            first_unit = begin + step * units.copies
            units.fetch(k_ref, head, lookup, first_unit, end - 1, k_ring.at[slot], k_ready.at[slot])

        def fetch_queries(turn, slot):
            index = first_tile + (0 if shape.one_tile else lax.rem(turn, count))
            plgpu.copy_gmem_to_smem(q_ref.at[index, head], q_ring.at[slot], q_ready.at[slot])

        @pl.when(steps > 0)
        def _start():
            for turn in range(shape.query_stages):
                pl.when(turn < steps * count)(lambda turn=turn: fetch_queries(turn, turn))
            for step in range(stages):
                pl.when(step < steps)(lambda step=step: fetch(step, step))

        def per_row(ref, *at):
            return plgpu.load(ref.at[at], layout=by_row, optimized=False)

        def given(keys, index, slot, rows, at):
            """Probabilities of the slots `at` under some rows of a query tile, over its rounds."""
            seen = tiles.visible(
                at,
                spread(per_row(first_ref, index, of_list, rows), at),
                spread(per_row(stop_ref, index, of_list, rows), at),
            )
            most = None
            for turn in range(shape.rounds):
                here = pl.ds(turn * shape.rows + rows.start, at_once)
                query = plgpu.load(q_ring.at[slot, here], layout=mma.lhs)
                scores = mma.dot(constant((at_once, tile), 0.0, mma.acc), query, keys)
                scores = tiles.capped(scores * scale, soft_cap) * LOG2E if soft_cap else scores * (scale * LOG2E)
                scores -= spread(per_row(norms_ref, index, head, here), scores)
                weights = jnp.where(seen, jnp.exp2(scores), 0.0)
                weights = weights.sum(axis=1) if shape.per_page else weights
                most = weights if most is None else jnp.maximum(most, weights)
            return most

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, jnp.int32(stages))
            base = (begin + step * units.copies) * units.unit
            tiles.wait(k_ready.at[slot])
            keys = plgpu.load(k_ring.at[slot].transpose((1, 0)), layout=mma.rhs)
            pl.when(step + stages < steps)(lambda: fetch(step + stages, slot))
            at = plgpu.broadcasted_iota(jnp.int32, (at_once, tile), 1, layout=mma.acc) + base

            def over_tile(index, total):
                turn = step * count + index
                q_slot = 0 if shape.one_tile else lax.rem(turn, jnp.int32(2))
                if not shape.one_tile:
                    tiles.wait(q_ready.at[q_slot])
                for top in range(0, shape.rows, at_once):
                    more = given(keys, first_tile + index, q_slot, pl.ds(top, at_once), at)
                    total = jnp.maximum(total, more) if shape.largest else total + more
                if not shape.one_tile:
                    pl.when(turn + 2 < steps * count)(lambda: fetch_queries(turn + 2, q_slot))
                return total

            nothing = constant((at_once, tile), 0.0, mma.acc)
            if shape.per_page:
                nothing = constant((at_once,), 0.0, by_row)
            if shape.one_tile:
                pl.when(step == 0)(lambda: tiles.wait(q_ready.at[0]))
                total = over_tile(0, nothing)
            else:
                total = lax.fori_loop(0, count, over_tile, nothing)
            if shape.per_page:
                out_ref[row, head, begin + step] = total
            else:
                total = total.max(axis=0) if shape.largest else total.sum(axis=0)
                out_ref[row, head, pl.ds(base, tile)] = total

    padded = -(-slots // tile) * tile
    out = (shape.width, at_once) if shape.per_page else (padded,)
    swizzled = tiles.swizzled(head_dim, q.dtype)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, shape.kv_heads, *out), jnp.float32),
        grid=(splits, shape.kv_heads, batch),
        grid_names=("part", "head", "row"),
        scratch_types=[
            plgpu.SMEM((shape.query_stages, *q.shape[2:]), q.dtype, transforms=swizzled),
            plgpu.SMEM((stages, tile, head_dim), q.dtype, transforms=swizzled),
            plgpu.Barrier(num_barriers=shape.query_stages),
            plgpu.Barrier(num_arrivals=units.copies, num_barriers=stages),
        ],
        compiler_params=tiles.compiler_params(),
        interpret=simulator(),
        kernel_name="attention_mass",
    )
    found = kernel(q, norms, first, stop, tile_of, tile_count, k_pages, page_ids, lowest, highest)
    return found if shape.per_page else found[..., :slots]
