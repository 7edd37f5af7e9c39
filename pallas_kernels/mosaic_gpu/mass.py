"""Probability that queries give to the slots of their rows' page lists: the kernel.

One block of 128 threads serves one part of one row's list for one KV head. Tiles of keys stream through a ring as in
`decode`, codes with their scales as in `coded_decode`; the queries of the row pass over each of them, again and again
where a chunk has many. Codes are widened and scaled in registers, once per tile.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import coded_decode, tiles
from pallas_kernels.mosaic_gpu.coded_decode import Piece, loaded, opened
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
    whose slots add up before anything else. `one_tile`: every row of the lists has a single query tile. `coded`: keys
    are codes in such pages.
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
    coded: coded_decode.Shape | None = None

    @property
    def tile(self) -> int:
        if self.per_page:
            return self.page
        return 64 if self.coded is None else max(64, self.page)

    @property
    def parts(self) -> list[Piece]:
        """The parts of a step that are products of their own."""
        return [Piece(0, 0, 0, None)] if self.coded is None else self.coded.step(self.tile)

    @property
    def columns(self) -> int:
        """Slots of a part."""
        return self.tile if self.coded is None else self.coded.part

    @property
    def row_warps(self) -> int:
        """Columns of a product come in 32 where one warp holds all 16 rows, in 16 where two hold 32."""
        if self.coded is not None:
            return self.coded.row_warps
        return 1 if self.tile % 32 == 0 else 2

    @property
    def rows(self) -> int:
        """Queries of a round and what fills whole products."""
        return -(-self.queries // (16 * self.row_warps)) * 16 * self.row_warps

    @property
    def stages(self) -> int:
        """Steps whose keys are in flight or in use."""
        return max(2, min(6, RING_BYTES // self.stage_bytes))

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one step's keys."""
        if self.coded is None:
            return 2 * self.tile * self.head_dim
        return self.tile // self.page * (self.coded.byte_rows * self.head_dim + 4 * self.coded.padded_scales(4))

    @property
    def query_stages(self) -> int:
        return 1 if self.one_tile else 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one block, without barriers."""
        queries = self.query_stages * self.rounds * self.rows
        return self.stages * self.stage_bytes + 2 * self.head_dim * queries


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
    scales: jax.Array | None,
    *,
    shape: Shape,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """Mass under query tiles q [X, K, rounds * M, D] with log-sum-exp `norms` in powers of two [X, K, rounds * M].

    Row m of a tile sees slots [first, stop) [X, Kl, M]. Row b of the lists has `tile_count[b]` tiles from `tile_of[b]`
    on, which see slots within [lowest, highest) [B, Kl], lowest a multiple of the steps' tile. Returns float32
    [B, K, J * P], or with `per_page` [B, K, J, C] whose C numbers add up (or have their largest taken); what no query
    of a row may see is unwritten.
    """
    batch, head_dim, tile, stages = page_ids.shape[0], shape.head_dim, shape.tile, shape.stages
    parts, columns, coded = shape.parts, shape.columns, shape.coded
    # Keys of what is weighed together are in registers together.
    groups = [parts] if shape.per_page else [[part] for part in parts]
    units = tiles.Units.of(shape.page, tile)
    slots = shape.width * shape.page
    splits = split_count(batch * shape.kv_heads, slots, tile)
    mma = Mma(q.dtype, shape.row_warps)
    by_row, at_once = mma.acc.reduce(1), mma.rows

    def body(
        q_ref, norms_ref, first_ref, stop_ref, tile_ref, count_ref, k_ref, ids_ref, lowest_ref, highest_ref, *refs
    ):  # fmt: skip
        scales_ref, *refs = refs if coded else (None, *refs)
        out_ref, q_ring, k_ring, q_ready, k_ready, scales_ring = refs if coded else (*refs, None)
        part, head, row = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("row")
        of_list = head if shape.lists > 1 else 0
        begin, end, steps = tiles.part_of(
            part, lowest_ref[row, of_list], highest_ref[row, of_list], units.unit, units.copies, splits, LEAST
        )
        first_tile, count = tile_ref[row], 1 if shape.one_tile else count_ref[row]
        turns = steps * len(groups) * count

        def fetch(step, slot):
            lookup = functools.partial(tiles.page_of, ids_ref, row, of_list)
            first_unit = begin + step * units.copies
            if coded is None:
                units.fetch(k_ref, head, lookup, first_unit, end - 1, k_ring.at[slot], k_ready.at[slot])
                return
            for i in range(units.copies):
                physical = lookup(jnp.minimum(first_unit + i, end - 1))
                plgpu.copy_gmem_to_smem(k_ref.at[physical, head], k_ring.at[slot, i], k_ready.at[slot])
                for first, count in coded.scale_pieces:
                    piece = pl.ds(first, count)
                    plgpu.copy_gmem_to_smem(
                        scales_ref.at[physical, head, piece], scales_ring.at[slot, i, piece], k_ready.at[slot]
                    )

        def keys_of(slot, part):
            """Keys [D, columns] of a part of a step."""
            if coded is None:
                return plgpu.load(k_ring.at[slot].transpose((1, 0)), layout=mma.rhs)
            stored = k_ring.at[slot, part.page, pl.ds(part.first, columns)].transpose((1, 0))
            values = opened(plgpu.load(stored, layout=mma.rhs), part.shift).astype(jnp.float32)
            sides = [
                tiles.placed(
                    loaded(scales_ring.at[slot, part.page], at, head_dim, mma.rhs.reduce(1)), values.shape, 0, mma.rhs
                )
                for at in range(0, head_dim * (2 if coded.codec == "int4" else 1), head_dim)
            ]
            values = values * sides[0]
            return (values + sides[1] if len(sides) > 1 else values).astype(q.dtype)

        def fetch_queries(turn, slot):
            index = first_tile + (0 if shape.one_tile else lax.rem(turn, count))
            plgpu.copy_gmem_to_smem(q_ref.at[index, head], q_ring.at[slot], q_ready.at[slot])

        @pl.when(steps > 0)
        def _start():
            for turn in range(shape.query_stages):
                pl.when(turn < turns)(lambda turn=turn: fetch_queries(turn, turn))
            for step in range(stages):
                pl.when(step < steps)(lambda step=step: fetch(step, step))

        def per_row(ref, *at):
            return plgpu.load(ref.at[at], layout=by_row, optimized=False)

        def given(keys, index, slot, rows, places):
            """Probabilities of the slots of each part under some rows of a query tile, over its rounds; those of all
            parts together where they add up."""
            first, stop = (per_row(ref, index, of_list, rows) for ref in (first_ref, stop_ref))
            seen = [tiles.visible(at, spread(first, at), spread(stop, at)) for at in places]
            most = None
            for turn in range(shape.rounds):
                here = pl.ds(turn * shape.rows + rows.start, at_once)
                query = plgpu.load(q_ring.at[slot, here], layout=mma.lhs)
                norm = per_row(norms_ref, index, head, here)
                found = []
                for part, sees in zip(keys, seen, strict=True):
                    scores = mma.dot(constant((at_once, columns), 0.0, mma.acc), query, part)
                    scores = tiles.capped(scores * scale, soft_cap) * LOG2E if soft_cap else scores * (scale * LOG2E)
                    found.append(jnp.where(sees, jnp.exp2(scores - spread(norm, scores)), 0.0))
                if shape.per_page:
                    found = [functools.reduce(jnp.add, [weights.sum(axis=1) for weights in found])]
                most = found if most is None else list(map(jnp.maximum, most, found))
            return most

        def weigh(step, number, keys, column, base, together):
            """Gives out what the queries of the row give to the slots of some parts of a step."""
            starts = [base + part.page * shape.page + part.token for part in together]
            places = [column + start for start in starts]

            def over_tile(index, total):
                turn = number * count + index
                q_slot = 0 if shape.one_tile else lax.rem(turn, jnp.int32(2))
                if not shape.one_tile:
                    tiles.wait(q_ready.at[q_slot])
                for top in range(0, shape.rows, at_once):
                    more = given(keys, first_tile + index, q_slot, pl.ds(top, at_once), places)
                    total = tuple(map(jnp.maximum if shape.largest else jnp.add, total, more))
                if not shape.one_tile:
                    pl.when(turn + 2 < turns)(lambda: fetch_queries(turn + 2, q_slot))
                return total

            nothing = tuple(constant((at_once, columns), 0.0, mma.acc) for _ in together)
            if shape.per_page:
                nothing = (constant((at_once,), 0.0, by_row),)
            if shape.one_tile:
                pl.when(number == 0)(lambda: tiles.wait(q_ready.at[0]))
                total = over_tile(0, nothing)
            else:
                total = lax.fori_loop(0, count, over_tile, nothing)
            if shape.per_page:
                out_ref[row, head, begin + step] = total[0]
                return
            for start, part in zip(starts, total, strict=True):
                part = part.max(axis=0) if shape.largest else part.sum(axis=0)
                out_ref[row, head, pl.ds(start, columns)] = part

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, jnp.int32(stages))
            base = (begin + step * units.copies) * units.unit
            tiles.wait(k_ready.at[slot])
            column = plgpu.broadcasted_iota(jnp.int32, (at_once, columns), 1, layout=mma.acc)
            for number, together in enumerate(groups):
                keys = [keys_of(slot, part) for part in together]
                if number == len(groups) - 1:
                    pl.when(step + stages < steps)(lambda: fetch(step + stages, slot))
                weigh(step, step * len(groups) + number, keys, column, base, together)

    padded = -(-slots // tile) * tile
    out = (shape.width, at_once) if shape.per_page else (padded,)
    swizzled = tiles.swizzled(head_dim, q.dtype)
    ring, pieces, scale_ring = (stages, tile, head_dim), 0, []
    if coded is not None:
        ring, pieces = (stages, units.copies, coded.byte_rows, head_dim), len(coded.scale_pieces)
        padded_scales = coded.padded_scales(scales.dtype.itemsize)
        scale_ring = [plgpu.SMEM((stages, units.copies, padded_scales), scales.dtype)]
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, shape.kv_heads, *out), jnp.float32),
        grid=(splits, shape.kv_heads, batch),
        grid_names=("part", "head", "row"),
        scratch_types=[
            plgpu.SMEM((shape.query_stages, *q.shape[2:]), q.dtype, transforms=swizzled),
            plgpu.SMEM(ring, k_pages.dtype, transforms=tiles.swizzled(head_dim, k_pages.dtype)),
            plgpu.Barrier(num_barriers=shape.query_stages),
            plgpu.Barrier(num_arrivals=units.copies * (1 + pieces), num_barriers=stages),
            *scale_ring,
        ],
        compiler_params=tiles.compiler_params(),
        interpret=simulator(),
        kernel_name="attention_mass",
    )
    sides = () if scales is None else (scales,)
    found = kernel(q, norms, first, stop, tile_of, tile_count, k_pages, page_ids, lowest, highest, *sides)
    return found if shape.per_page else found[..., :slots]
