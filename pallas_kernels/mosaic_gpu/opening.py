"""Pages of codes (int8, fp8, packed int4) as bfloat16 pages: the kernel.

One block of 128 threads takes one part of a list for one KV head, page by page: codes and scales stream through a ring
as in `coded_decode`, values leave through two small tiles, one of which is on its way out while the other is filled.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tiles
from pallas_kernels.mosaic_gpu.coded_decode import Shape, loaded, opened
from pallas_kernels.mosaic_gpu.target import require, require_shared, simulator
from pallas_kernels.mosaic_gpu.tiles import Mma
from pallas_kernels.mosaic_gpu.work import MULTIPROCESSORS

DTYPE = jnp.bfloat16
RING_BYTES = 64 * 1024
LEAST = 2  # pages of a part
TILES = 2


def open_listed(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k_codes: jax.Array,
    v_codes: jax.Array,
    scales: jax.Array,
    page_ids: jax.Array,
    targets: jax.Array,
    first: jax.Array,
    stop: jax.Array,
    *,
    shape: Shape,
) -> tuple[jax.Array, jax.Array]:
    """Writes entries [first, stop) [B, Kl] of lists [B, Kl, J] into pages `targets` of dense pools, in place.

    Pages named twice are written twice. Returns the new pools; declines what the kernel cannot do.
    """
    require(k_pages.dtype == DTYPE, f"pages must be opened as bfloat16; got {k_pages.dtype}")
    shape.check_pages(scales.dtype)
    dim, n, page = shape.head_dim, shape.part, shape.page
    width = shape.padded_scales(scales.dtype.itemsize)
    stages = max(2, min(6, RING_BYTES // shape.stage_bytes(page, scales.dtype.itemsize)))
    require_shared(stages * shape.stage_bytes(page, scales.dtype.itemsize) + TILES * 2 * n * dim)
    mma, parts, pieces = Mma(DTYPE, shape.row_warps), shape.step(page), shape.scale_pieces
    splits = max(1, min(math.ceil(shape.width / LEAST), math.ceil(4 * MULTIPROCESSORS / shape.kv_heads)))
    has_zeros = shape.codec == "int4"
    keys_end = dim * (2 if has_zeros else 1)

    def body(
        k_codes_ref, v_codes_ref, scales_ref, ids_ref, targets_ref, first_ref, stop_ref, k_ref, v_ref,
        k_ring, v_ring, scales_ring, out, ready,
    ):  # fmt: skip
        part, head, row = (lax.axis_index(name) for name in ("part", "head", "row"))
        of_list = head if shape.lists > 1 else 0
        begin, _, steps = tiles.part_of(part, first_ref[row, of_list], stop_ref[row, of_list], 1, 1, splits, LEAST)

        def fetch(step, slot):
            physical = tiles.page_of(ids_ref, row, of_list, begin + step)
            plgpu.copy_gmem_to_smem(k_codes_ref.at[physical, head], k_ring.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(v_codes_ref.at[physical, head], v_ring.at[slot], ready.at[slot])
            for at, count in pieces:
                piece = pl.ds(at, count)
                plgpu.copy_gmem_to_smem(
                    scales_ref.at[physical, head, piece], scales_ring.at[slot, piece], ready.at[slot]
                )

        for step in range(stages):
            pl.when(step < steps)(lambda step=step: fetch(step, step))

        def write(values, to, target, token, tile):
            plgpu.wait_smem_to_gmem(TILES - 1, wait_read_only=True)
            # Bytes load only along their rows.
            tile.transpose((1, 0))[...] = values.astype(DTYPE)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, to.at[target, head, pl.ds(token, n)])

        def values_of(ring, slot, part, by, axis, at):
            """Numbers [D, n] of a part of a page: codes by scales along `axis`, from number `at` on, and zeros."""
            stored = plgpu.load(ring.at[slot, pl.ds(part.first, n)].transpose((1, 0)), layout=mma.rhs)
            values = opened(stored, part.shift).astype(jnp.float32)
            count = values.shape[axis]
            side = lambda at: tiles.placed(  # noqa: E731
                loaded(scales_ring.at[slot], at, count, mma.rhs.reduce(1 - axis)), values.shape, axis, mma.rhs
            )
            values = values * side(at)
            return values + side(at + by) if has_zeros else values

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, jnp.int32(stages))
            target = targets_ref[row, of_list, begin + step]
            tiles.wait(ready.at[slot])
            for part in parts:
                keys = values_of(k_ring, slot, part, dim, 0, 0)
                write(keys, k_ref, target, part.token, out.at[0])
                values = values_of(v_ring, slot, part, page, 1, keys_end + part.token)
                write(values, v_ref, target, part.token, out.at[1])
            pl.when(step + stages < steps)(lambda: fetch(step + stages, slot))

        plgpu.wait_smem_to_gmem(0)

    ring = plgpu.SMEM((stages, shape.byte_rows, dim), k_codes.dtype, transforms=tiles.swizzled(dim, k_codes.dtype))
    into = [jax.new_ref(pool) for pool in (k_pages, v_pages)]
    plgpu.kernel(
        body,
        grid=(splits, shape.kv_heads, shape.rows),
        grid_names=("part", "head", "row"),
        scratch_types=[
            ring,
            ring,
            plgpu.SMEM((stages, width), scales.dtype),
            plgpu.SMEM((TILES, n, dim), DTYPE, transforms=tiles.swizzled(dim, DTYPE)),
            plgpu.Barrier(num_arrivals=2 + len(pieces), num_barriers=stages),
        ],
        compiler_params=tiles.compiler_params(),
        interpret=simulator(),
        kernel_name="open_pages",
    )(k_codes, v_codes, scales, page_ids, targets, first, stop, *into)
    return jax.freeze(into[0]), jax.freeze(into[1])
