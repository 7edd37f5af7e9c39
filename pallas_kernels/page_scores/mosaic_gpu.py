"""`page_scores` on Hopper and newer GPUs.

A block of 128 threads streams the bounds of one part of a row's pages: those of a page of all its KV heads are one
bulk copy. The tensor cores multiply them with the queries of all these heads, K times what is needed: about 32
products per byte at 32 query heads, which they do while bytes arrive. What belongs to other heads is masked out of the
maximum over the group. Queries that 16 bits do not hold come in two parts, so that scores stay bounds.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tiles
from pallas_kernels.mosaic_gpu.target import require, require_operands, require_tma, simulator
from pallas_kernels.mosaic_gpu.tiles import HIDDEN, Mma, constant
from pallas_kernels.mosaic_gpu.work import split_count
from pallas_kernels.page_scores.queries import beside, split

ROWS = 64  # query heads of a block at most
COLUMNS = 64  # (page, KV head) pairs of a step, about
RING_BYTES = 96 * 1024
BOX = 256  # elements of one dimension that one bulk copy takes


@dataclasses.dataclass(frozen=True)
class Shape:
    """How one call is cut: `blocks` of `heads` KV heads, each of `group` query heads; bounds of `width` numbers."""

    rows: int
    listed: int
    blocks: int
    heads: int
    group: int
    width: int
    parts: int  # of the queries

    @classmethod
    def of(cls, q: jax.Array, bounds: jax.Array, page_ids: jax.Array, group: str) -> Shape:
        """The fewest blocks whose query heads a product holds."""
        rows, heads, _ = q.shape
        _, kv_heads, width = bounds.shape
        each = heads // kv_heads if group == "max" else 1
        require(each <= ROWS, f"at most {ROWS} query heads per KV head; got {each}")
        blocks = next(b for b in range(1, kv_heads + 1) if kv_heads % b == 0 and kv_heads // b * each <= ROWS)
        exact = group == "max" and q.dtype == bounds.dtype
        return cls(rows, page_ids.shape[2], blocks, kv_heads // blocks, each, width, 1 if exact else 2)

    @property
    def row_warps(self) -> int:
        """Warps that share the query heads of a product; the others share its columns."""
        return next(w for w in (1, 2, 4) if self.heads * self.group <= 16 * w)

    @property
    def pages(self) -> int:
        """Pages of a step: whole products."""
        columns = 32 // self.row_warps
        unit = columns // math.gcd(columns, self.heads)
        return unit * max(1, COLUMNS // (unit * self.heads))

    @property
    def tiled(self) -> bool:
        """Whether a page's bounds are whole rows of the tiles of shared memory."""
        return self.heads % 8 == 0

    @property
    def stages(self) -> int:
        """Steps whose bounds are in flight or in use."""
        return max(2, min(4, RING_BYTES // (2 * self.pages * self.heads * self.width)))

    @property
    def splits(self) -> int:
        """Parts of each list."""
        return split_count(self.rows * self.blocks, self.listed, self.pages)

    def check(self, bounds: jax.Array, lists: int) -> None:
        """Declines what the kernel cannot do."""
        require_operands(bounds.dtype)
        require(lists == 1, "bounds of all KV heads are one copy: lists must be shared by the KV heads")
        require(self.width % 32 == 0, f"bounds must be multiples of 32 numbers; got {self.width}")
        require(
            self.tiled or (self.width <= BOX and self.heads * self.width % 64 == 0),
            f"bounds of {self.heads} KV heads must be at most {BOX} numbers each and multiples of 64 together;"
            f" got {self.width}",
        )


def page_scores(
    q: jax.Array,
    bounds: jax.Array,
    page_ids: jax.Array,
    counts: jax.Array,
    *,
    group: str = "max",
    scale: float,
) -> jax.Array:
    """See `pallas_kernels.page_scores`."""
    shape = Shape.of(q, bounds, page_ids, group)
    shape.check(bounds, page_ids.shape[1])
    require_tma()
    rows, kv_heads = q.shape[0], bounds.shape[1]
    queries = beside(q, kv_heads, shape.width, group)
    parts = [queries.astype(bounds.dtype)] if shape.parts == 1 else split(queries, bounds.dtype)
    by_block = [x.reshape(rows, shape.blocks, -1, shape.width) for x in parts]
    padding = (0, 16 * shape.row_warps - shape.heads * shape.group)
    queries = jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), padding, (0, 0))) for x in by_block], axis=2)
    scores = _scores(queries, bounds, page_ids, counts, shape, scale)
    scores = scores.reshape(rows, shape.blocks, -1, shape.heads).swapaxes(2, 3)
    scores = scores.reshape(rows, kv_heads, -1)[:, :, : shape.listed]
    return jnp.where(jnp.arange(shape.listed) < counts[:, :, None], scores, HIDDEN)


def _scores(
    q: jax.Array, bounds: jax.Array, page_ids: jax.Array, counts: jax.Array, shape: Shape, scale: float
) -> jax.Array:
    """Scores [B, X, steps * pages * heads] of queries [B, X, parts * M, width]; what no page of the list has is
    unwritten."""
    heads, pages, width, stages = shape.heads, shape.pages, shape.width, shape.stages
    rows, columns = q.shape[2] // shape.parts, pages * heads
    mma = Mma(bounds.dtype, shape.row_warps)
    chunk = 64 if width % 64 == 0 else 32
    least = 8

    def body(q_ref, bounds_ref, ids_ref, counts_ref, out_ref, q_tile, ring, q_ready, ready):
        part, block, row = lax.axis_index("part"), lax.axis_index("block"), lax.axis_index("row")
        begin, end, steps = tiles.part_of(part, 0, counts_ref[row, 0], 1, pages, shape.splits, least)

        def fetch(step, slot):
            for i in range(pages):
                # Past the end the last page comes again: what is not listed is never looked up.
                page = tiles.page_of(ids_ref, row, 0, jnp.minimum(begin + step * pages + i, end - 1))
                source = bounds_ref.at[page]
                if shape.blocks > 1:
                    source = bounds_ref.at[page, pl.ds(block * heads, heads)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot, pl.ds(i * heads, heads)], ready.at[slot])

        @pl.when(steps > 0)
        def _start():
            plgpu.copy_gmem_to_smem(q_ref.at[row, block], q_tile, q_ready)
            for step in range(stages):
                pl.when(step < steps)(lambda step=step: fetch(step, step))
            plgpu.barrier_wait(q_ready)

        at = [pl.ds(first, chunk) for first in range(0, width, chunk)]
        queries = [
            [plgpu.load(q_tile.at[pl.ds(part * rows, rows), c], layout=mma.lhs) for c in at]
            for part in range(shape.parts)
        ]
        of_row = lax.div(plgpu.broadcasted_iota(jnp.int32, (rows, columns), 0, layout=mma.acc), shape.group)
        of_column = lax.rem(plgpu.broadcasted_iota(jnp.int32, (rows, columns), 1, layout=mma.acc), heads)

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, jnp.int32(stages))
            tiles.wait(ready.at[slot])
            scores = constant((rows, columns), 0.0, mma.acc)
            for i, columns_of in enumerate(at):
                bound = plgpu.load(
                    ring.at[slot, :, columns_of].transpose((1, 0)), layout=mma.rhs, optimized=shape.tiled
                )
                for of_part in queries:
                    scores = mma.dot(scores, of_part[i], bound)
            pl.when(step + stages < steps)(lambda: fetch(step + stages, slot))
            best = jnp.where(of_row == of_column, scores * scale, HIDDEN).max(axis=0)
            out_ref[row, block, pl.ds((begin + step * pages) * heads, columns)] = best

    swizzled = tiles.swizzled(width, bounds.dtype)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((*q.shape[:2], -(-shape.listed // pages) * columns), jnp.float32),
        grid=(shape.splits, shape.blocks, shape.rows),
        grid_names=("part", "block", "row"),
        scratch_types=[
            plgpu.SMEM(q.shape[2:], bounds.dtype, transforms=swizzled),
            plgpu.SMEM((stages, columns, width), bounds.dtype, transforms=swizzled if shape.tiled else ()),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
        ],
        compiler_params=tiles.compiler_params(),
        interpret=simulator(),
        kernel_name="page_scores",
    )
    return kernel(q, bounds, page_ids, counts)
