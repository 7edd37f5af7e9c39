"""Decode attention over DeltaKV latents: the kernel.

As in `coded_decode`, one block serves one part of a row's list for one KV head; a step takes one page. The head's part
of g stays in shared memory for all steps. A page's latents become bfloat16 in a tile of shared memory, which is read
twice: its product with g gives the keys before rotation, and the weights sum it up, so that values are never built (g
is applied to the sums outside). A page names few centers: each is added in registers to the tokens that take it. Rows d
and d + D / 2 of the keys are two products, so that rotating needs no exchange between threads; angles are those of the
page's first token plus those of a table that all pages share.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.deltakv import Grid
from pallas_kernels.mosaic_gpu import tiles
from pallas_kernels.mosaic_gpu.coded_decode import BOX, loaded, opened
from pallas_kernels.mosaic_gpu.split import Config, Lists, Part, launch
from pallas_kernels.mosaic_gpu.target import SHARED_BYTES, require, require_shared, simulator
from pallas_kernels.mosaic_gpu.tiles import HIDDEN, LOG2E, Mma, constant

DTYPE = jnp.bfloat16
HALF = 64  # rows of one warpgroup product: half a head
NAMED = 32  # centers that come with a page, at most
CHUNK = 128  # channels of a latent that are summed up together
QUERIES, ROWS = 8, 16  # queries of a block, and rows of the products that they are the first of


@dataclasses.dataclass(frozen=True)
class Shape(Lists):
    """Extents of one call: also the width of a latent and the grid of its pages."""

    latent: int
    grid: Grid

    def stage_bytes(self) -> int:
        """Shared memory of what comes with one page: codes, scales and centers, what tokens take, and angles."""
        side = 4 * (self.grid.neighbours * self.page + 2 * NAMED + 2 * HALF)
        named = self.grid.own + self.grid.references
        return self.page // 2 * self.latent + 4 * self.latent + 2 * named * self.head_dim + side

    def shared_bytes(self, stages: int) -> int:
        """Shared memory of a block, without barriers."""
        wide = self.head_dim + self.page  # rows of g and of latents
        tiles_bytes = 2 * (wide * self.latent + self.head_dim * (self.page + ROWS) + self.page * ROWS)
        return tiles_bytes + 2 * 4 * HALF * self.page + stages * self.stage_bytes()

    def default(self) -> Config:
        """As many pages in flight as fit, up to four; parts long enough that bringing g pays."""
        stages = next((n for n in (4, 3, 2) if self.shared_bytes(n) <= SHARED_BYTES - 1024), 1)
        return dataclasses.replace(self.config(2 * self.page, stages), tile=self.page, least=16)

    def check(self, config: Config, dtype: jnp.dtype, rows: int) -> None:
        """Declines what the kernel cannot do."""
        grid = self.grid
        require(dtype == DTYPE, f"queries must be bfloat16 (codes are multiplied as such); got {dtype}")
        require(grid.latents == "int4", f"latents must be int4; got {grid.latents}")
        require(grid.centers == "int8", f"centers must be int8; got {grid.centers}")
        require(self.page in (32, 64), f"page size must be 32 or 64; got {self.page}")
        require(self.head_dim == 2 * HALF, f"head dim must be {2 * HALF}; got {self.head_dim}")
        require(self.latent % CHUNK == 0, f"latent width must be a multiple of {CHUNK}; got {self.latent}")
        count = grid.own + grid.references
        require(count <= NAMED, f"a page may name {NAMED} centers with its own; got {count}")
        taken = grid.neighbours * self.page
        require(taken <= BOX, f"tokens of a page may take {BOX} centers together; got {taken}")
        require(rows == grid.padded_rows, f"latents of a page must be padded to {grid.padded_rows} rows; got {rows}")
        require_shared(self.shared_bytes(config.stages))


def decode(
    q: jax.Array,
    latents: jax.Array,
    latent_scales: jax.Array,
    centers: jax.Array,
    g: jax.Array,
    numbers: jax.Array,
    taken: jax.Array,
    scales: jax.Array,
    turns: jax.Array,
    angles: jax.Array,
    offsets: jax.Array,
    page_ids: jax.Array,
    logical: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    shape: Shape,
    scale: float,
    soft_cap: float | None,
    config: Config,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised parts of the attention of q [B, K * X, 16, D], of whose rows 8 count.

    It is that over slots [first, stop) [B, 1] of the lists.
    latents [N, A, P / 2, C], their scales [N, A, 2, C], centers [N * Pc, K, 2D], g of the keys [K * C / 128, D, 128];
    per entry of the lists numbers of its centers [B, J, Q], which of them each place takes [B, J, k * P], and their
    scales [B, K, J, 2 * NAMED], those of K first; cos and sin of the first position of each logical page
    [L, 2 * D / 2], and of each place of a page [2, D / 2, P], whose token is number `offsets` [P] of the page. Results
    are those of `split.launch`, those of `out` [C + D, 8] the sums of latents, then of the V of centers.
    """
    heads, groups = centers.shape[1], latents.shape[1]
    n, latent, dim, grid, stages = shape.page, shape.latent, shape.head_dim, shape.grid, config.stages
    half_rows, count = n // 2, grid.own + grid.references
    chunks, halves = range(0, latent, CHUNK), (pl.ds(0, HALF), pl.ds(HALF, HALF))
    mma, narrow = Mma(DTYPE, 1), Mma(DTYPE, 2 if half_rows % 32 else 1)
    wgmma = plgpu.Layout.WGMMA
    row_layout = mma.acc.reduce(1)

    def body(
        q_ref, z_ref, sides_ref, centers_ref, g_ref, numbers_ref, taken_ref, scales_ref, turns_ref, angles_ref,
        offsets_ref, ids_ref, logical_ref, first_ref, stop_ref, out_ref, top_ref, total_ref, q_tile, q_ready,
        g_tile, angle_tiles, once, z_tile, k_tile, p_tile, decay_tile,
        z_ring, side_ring, center_ring, taken_ring, scale_ring, turn_ring, ready,
    ):  # fmt: skip
        here = Part.here(first_ref, stop_ref, shape, config, n, 1)
        group = lax.div(here.head, heads // groups)

        def fetch(step, slot):
            entry = here.begin + step
            page, arrived = tiles.page_of(ids_ref, here.row, 0, entry), ready.at[slot]
            for chunk, at in enumerate(chunks):
                part = z_ref.at[page, group, :, pl.ds(at, CHUNK)]
                plgpu.copy_gmem_to_smem(part, z_ring.at[slot, chunk], arrived)
            for side in range(2):
                for at in range(0, latent, BOX):
                    piece = pl.ds(at, min(BOX, latent - at))
                    source = sides_ref.at[page, group, side, piece]
                    plgpu.copy_gmem_to_smem(source, side_ring.at[slot, side, piece], arrived)
            for i in range(count):
                center = numbers_ref[here.row, entry, i]
                plgpu.copy_gmem_to_smem(centers_ref.at[center, here.head], center_ring.at[slot, i], arrived)
            plgpu.copy_gmem_to_smem(taken_ref.at[here.row, entry], taken_ring.at[slot], arrived)
            plgpu.copy_gmem_to_smem(scales_ref.at[here.row, here.head, entry], scale_ring.at[slot], arrived)
            plgpu.copy_gmem_to_smem(turns_ref.at[logical_ref[here.row, 0, entry]], turn_ring.at[slot], arrived)

        @pl.when(here.steps > 0)
        def _():
            for chunk in range(len(chunks)):
                plgpu.copy_gmem_to_smem(g_ref.at[here.head * len(chunks) + chunk], g_tile.at[chunk], once)
            plgpu.copy_gmem_to_smem(angles_ref, angle_tiles, once)

        here.start(q_ref, q_tile, q_ready, stages, fetch)
        pl.when(here.steps > 0)(lambda: plgpu.barrier_wait(once))
        offset = plgpu.load(offsets_ref, layout=mma.acc.reduce(0), optimized=False)
        offset = tiles.placed(offset, (ROWS, n), 1, mma.acc)

        def widen(slot):
            """Latents of the page into their tile; places without one hold zero."""

            def widen_chunk(chunk, _):
                stored = plgpu.load(z_ring.at[slot, chunk].transpose((1, 0)), layout=narrow.rhs)
                by, zero = (
                    tiles.placed(
                        loaded(side_ring.at[slot, side], chunk * CHUNK, CHUNK, narrow.rhs.reduce(1)),
                        stored.shape,
                        0,
                        narrow.rhs,
                    )
                    for side in range(2)
                )
                for half in range(2):
                    z = opened(stored, 4 * half).astype(jnp.float32) * by + zero
                    if half:
                        place = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=narrow.rhs) + half_rows
                        z = jnp.where(place < grid.others, z, 0.0)
                    rows = pl.ds(half * half_rows, half_rows)
                    z_tile.at[chunk, rows].transpose((1, 0))[...] = z.astype(DTYPE)

            lax.fori_loop(0, len(chunks), widen_chunk, None)

        def based(slot, side, parts):
            """`parts` [HALF, n], rows d and d + D / 2 by places, and what centers add: K (side 0) or V (side 1)."""
            number = [
                plgpu.load(taken_ring.at[slot, pl.ds(i * n, n)], layout=wgmma.reduce(0), optimized=False)
                for i in range(grid.neighbours)
            ]

            def add(center, parts):
                share = sum(jnp.where(one == center, 1 / grid.neighbours, 0.0) for one in number)
                share = tiles.placed(share * scale_ring[slot, side * NAMED + center], (HALF, n), 1, wgmma)
                codes = (
                    loaded(center_ring.at[slot, center], side * dim + at, HALF, wgmma.reduce(1)) for at in (0, HALF)
                )
                return tuple(
                    part + tiles.placed(code, (HALF, n), 0, wgmma) * share
                    for part, code in zip(parts, codes, strict=True)
                )

            return lax.fori_loop(0, count, add, parts)

        def rebuilt(rows):
            """Rows of the keys before rotation [HALF, n], but for their centers."""

            def product(ref):
                # Not unrolled: addresses of all operands would be held over the steps.
                @pl.loop(0, len(chunks))
                def _(chunk):
                    plgpu.wgmma(ref, g_tile.at[chunk, rows], z_tile.at[chunk].transpose((1, 0)))

                return ref[...]

            return pl.run_scoped(product, plgpu.ACC((HALF, n), jnp.float32))

        def step_over(step, carry):
            sums, top, total = carry
            slot = lax.rem(step, jnp.int32(stages))
            tiles.wait(ready.at[slot])
            widen(slot)
            plgpu.commit_smem()
            one, two = based(slot, 0, tuple(map(rebuilt, halves)))
            turn, turn_sin = (
                tiles.placed(loaded(turn_ring.at[slot], at, HALF, wgmma.reduce(1)), (HALF, n), 0, wgmma)
                for at in (0, HALF)
            )
            cos, sin = (plgpu.load(angle_tiles.at[i], layout=wgmma, optimized=False) for i in range(2))
            cos, sin = turn * cos - turn_sin * sin, turn_sin * cos + turn * sin
            k_tile.at[halves[0]][...] = (one * cos - two * sin).astype(DTYPE)
            k_tile.at[halves[1]][...] = (two * cos + one * sin).astype(DTYPE)
            plgpu.commit_smem()
            s = constant((ROWS, n), 0.0, mma.acc)
            for rows in halves:
                query = plgpu.load(q_tile.at[:, rows], layout=mma.lhs)
                s = mma.dot(s, query, plgpu.load(k_tile.at[rows], layout=mma.rhs))
            s = tiles.capped(s * scale, soft_cap) * LOG2E if soft_cap else s * (scale * LOG2E)
            seen = tiles.visible(offset + (here.begin + step) * n, here.first, here.stop)
            s = jnp.where(seen, s, HIDDEN)
            higher = jnp.maximum(top, plgpu.layout_cast(s.max(axis=1), row_layout))
            decay = jnp.exp2(top - higher)
            weights = jnp.where(seen, jnp.exp2(s - tiles.placed(higher, s.shape, 0, mma.acc)), 0.0)
            total = total * tiles.placed(decay, s.shape, 0, mma.acc) + weights
            p_tile[...] = weights.astype(DTYPE)
            decay_tile[...] = decay
            values = based(slot, 1, (constant((HALF, n), 0.0, wgmma),) * 2)
            plgpu.commit_smem()
            for rows, part in zip(halves, values, strict=True):
                k_tile.at[rows][...] = part.astype(DTYPE)
            plgpu.commit_smem()
            pl.when(step + stages < here.steps)(lambda: fetch(step + stages, slot))
            shrink = plgpu.load(decay_tile.at[pl.ds(0, QUERIES)], layout=wgmma.reduce(0), optimized=False)
            shrink = tiles.placed(shrink, (HALF, QUERIES), 1, wgmma)

            def summed(i):
                """What the weights sum up in block i of the sums, rows first: latents, then what centers add to V."""
                chunk, half = divmod(i, CHUNK // HALF)
                if chunk == len(chunks):
                    return k_tile.at[halves[half]]
                return z_tile.at[chunk, :, halves[half]].transpose((1, 0))

            def accumulated(i, acc):
                product = lambda ref: plgpu.wgmma(  # noqa: E731
                    ref, summed(i), p_tile.at[pl.ds(0, QUERIES)].transpose((1, 0))
                )
                if simulator() is None:
                    return pl.run_state(product)(plgpu.ACC.init(acc))

                def alone(ref):  # accumulators start at zero there
                    product(ref)
                    return ref[...]

                return acc + pl.run_scoped(alone, plgpu.ACC(acc.shape, jnp.float32))

            sums = tuple(accumulated(i, acc * shrink) for i, acc in enumerate(sums))
            return sums, higher, total

        sums, top, total = lax.fori_loop(
            0,
            here.steps,
            step_over,
            (
                (constant((HALF, QUERIES), 0.0, wgmma),) * ((latent + dim) // HALF),
                constant((ROWS,), HIDDEN, row_layout),
                constant((ROWS, n), 0.0, mma.acc),
            ),
        )

        @pl.when(here.steps > 0)
        def _():
            for i, acc in enumerate(sums):
                out_ref[here.row, here.block, here.part, pl.ds(i * HALF, HALF)] = acc

        top_ref[here.row, here.block, here.part] = top
        total_ref[here.row, here.block, here.part] = total.sum(axis=1)

    def tile(*extents):
        # Both operands of a warpgroup product must be swizzled alike, and rows of weights may have no more than 32.
        return plgpu.SMEM(extents, DTYPE, transforms=tiles.swizzled(32, DTYPE))

    arrivals = len(chunks) + 2 * -(-latent // BOX) + count + 3
    scratch = [
        tile(len(chunks), dim, CHUNK),
        plgpu.SMEM((2, HALF, n), jnp.float32),
        plgpu.Barrier(num_arrivals=len(chunks) + 1),
        tile(len(chunks), n, CHUNK),
        tile(dim, n),
        tile(ROWS, n),
        plgpu.SMEM((ROWS,), jnp.float32),
        plgpu.SMEM(
            (stages, len(chunks), half_rows, CHUNK), latents.dtype, transforms=tiles.swizzled(CHUNK, latents.dtype)
        ),
        plgpu.SMEM((stages, 2, latent), latent_scales.dtype),
        plgpu.SMEM((stages, count, 2 * dim), centers.dtype),
        plgpu.SMEM((stages, taken.shape[2]), jnp.int32),
        plgpu.SMEM((stages, 2 * NAMED), jnp.float32),
        plgpu.SMEM((stages, 2 * HALF), jnp.float32),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
    ]
    operands = (latents, latent_scales, centers, g, numbers, taken, scales, turns, angles, offsets)
    return launch(
        body,
        q,
        (*operands, page_ids, logical, first, stop),
        config.splits,
        scratch,
        "deltakv_decode_attention",
        out=(latent + dim, QUERIES),
    )
