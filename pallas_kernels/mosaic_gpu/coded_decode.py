"""Decode attention over pages of codes (int8, fp8, packed int4): the kernel.

As in `decode`, one block serves one part of a row's list for one KV head. A step takes whole pages; each
page brings its scales beside its codes. Codes become bfloat16 in registers as they are; the scales of the
keys multiply the queries once per page, those of the values the weights, and zeros add a product of the
queries with the page's zeros and one number per query. An int4 page holds two tokens per byte: its halves
are two parts of a step.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import tiles
from pallas_kernels.mosaic_gpu.split import Config, Lists, Part, candidates, launch
from pallas_kernels.mosaic_gpu.target import PAGES, SHARED_BYTES, require, require_shared
from pallas_kernels.mosaic_gpu.tiles import HIDDEN, LOG2E, Mma, constant, spread

WIDEST = 64  # tokens of a part; half where wide heads fill the registers
BOX = 256  # elements of one dimension that one bulk copy takes


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens of a step that are computed at once: byte rows [first, first + n) of its page number `page`,
    tokens from `token` of that page on, in the low (shift 0) or high (shift 4) bits where two share a
    byte."""

    page: int
    first: int
    token: int
    shift: int | None


@dataclasses.dataclass(frozen=True)
class Shape(Lists):
    """Extents of one call over coded pages: also the codec and how many numbers of scales a page has."""

    codec: str
    scales: int

    @property
    def byte_rows(self) -> int:
        """Rows of a page as stored."""
        return self.page // 2 if self.codec == "int4" else self.page

    @property
    def part(self) -> int:
        """Tokens of a part."""
        return min(self.byte_rows, WIDEST if self.head_dim <= 128 else WIDEST // 2)

    @property
    def row_warps(self) -> int:
        """Columns of a product come in 32 where one warp holds all 16 rows, in 16 where two hold 32."""
        return 1 if self.part % 32 == 0 and self.head_dim % 32 == 0 else 2

    def step(self, tile: int) -> list[Piece]:
        """The parts of a step of `tile` tokens."""
        return [
            Piece(page, first, first + (self.byte_rows if shift else 0), shift)
            for page in range(tile // self.page)
            for first in range(0, self.byte_rows, self.part)
            for shift in ((0, 4) if self.codec == "int4" else (None,))
        ]

    @property
    def scale_pieces(self) -> list[tuple[int, int]]:
        """Copies that bring a page's scales: first number and how many."""
        return [(at, min(BOX, self.scales - at)) for at in range(0, self.scales, BOX)]

    def padded_scales(self, itemsize: int) -> int:
        """Numbers that a page's scales take in shared memory: copies go to multiples of 128 bytes."""
        return -(-self.scales * itemsize // 128) * 128 // itemsize

    def stage_bytes(self, tile: int, scale_bytes: int) -> int:
        """Shared memory of one stage of the ring."""
        pages = tile // self.page
        return pages * (2 * self.byte_rows * self.head_dim + self.padded_scales(scale_bytes) * scale_bytes)

    def shared_bytes(self, config: Config, scale_bytes: int) -> int:
        """Shared memory of one block, without barriers."""
        rows = 16 * self.row_warps
        tiles_bytes = 2 * (rows * (self.head_dim + config.tile) + self.part * self.head_dim)
        return config.stages * self.stage_bytes(config.tile, scale_bytes) + tiles_bytes

    def default(self, scale_bytes: int) -> Config:
        """Two blocks per multiprocessor, each with up to about 80 KB of copies in flight."""
        tile = max(64, self.page)
        return self.config(tile, max(2, min(8, (80 * 1024) // self.stage_bytes(tile, scale_bytes))))

    def candidates(self, scale_bytes: int) -> list[Config]:
        """The heuristic's configuration first, then others that fit, for measuring."""
        sizes = sorted({max(size, self.page) for size in (32, 64, 128)})
        fits = lambda config: self.shared_bytes(config, scale_bytes) <= SHARED_BYTES  # noqa: E731
        return candidates(self.default(scale_bytes), sizes, (2, 4, 6, 8), fits)

    def check_pages(self, scale_dtype: jnp.dtype) -> None:
        """Declines pages that cannot be copied and widened."""
        require(self.page in PAGES, f"page size must be one of {PAGES}; got {self.page}")
        require(
            self.codec != "int4" or self.page >= 32,
            f"int4 pages must hold at least 32 tokens (16 rows of bytes per product); got {self.page}",
        )
        require(
            self.head_dim % 32 == 0 and 32 <= self.head_dim <= 256,
            f"head dim must be a multiple of 32 from 32 to 256 (swizzled rows of bytes); got {self.head_dim}",
        )
        scale_bytes = jnp.dtype(scale_dtype).itemsize
        require(
            self.scales * scale_bytes % 16 == 0,
            f"a page's scales must take a multiple of 16 bytes; got {self.scales} of {scale_bytes}",
        )

    def check(self, config: Config, dtype: jnp.dtype, scale_dtype: jnp.dtype) -> None:
        """Declines what the kernel cannot do."""
        require(dtype == jnp.bfloat16, f"queries must be bfloat16 (codes are multiplied as such); got {dtype}")
        self.check_pages(scale_dtype)
        require(
            self.codec != "fp8" or self.head_dim < 256,
            f"fp8 codes need a head dim below 256 (widening them by bits spills registers there); got {self.head_dim}",
        )
        require(config.tile % self.page == 0, f"a step must take whole pages; got {config.tile} tokens")
        require_shared(self.shared_bytes(config, jnp.dtype(scale_dtype).itemsize))


def opened(stored: jax.Array, shift: int | None) -> jax.Array:
    """Codes as stored, or those in the bits from `shift` on, as bfloat16 numbers, exactly."""
    if shift is not None:
        # 0x4300 is 128, and its last mantissa bits count ones.
        bits = ((stored.astype(jnp.uint16) >> shift) & 15) | 0x4300
        return lax.bitcast_convert_type(bits, jnp.bfloat16) - jnp.asarray(128, jnp.bfloat16)
    if stored.dtype == jnp.int8:
        return stored.astype(jnp.bfloat16)
    # No instruction converts these: the bits move to where bfloat16 has them and 120 is added to the exponent. That
    # is wrong for the subnormal ones alone, m/8 * 2^-6, of which it makes (1 + m/8) * 2^-7. NaN becomes 480, which
    # nobody sees: it only stands in slots that are not there.
    bits = lax.bitcast_convert_type(stored, jnp.uint8).astype(jnp.uint16)
    sign = (bits & 0x80) << 8
    value = lax.bitcast_convert_type(sign | (((bits & 0x7F) << 4) + 0x3C00), jnp.bfloat16)
    least = lax.bitcast_convert_type(sign | 0x3C80, jnp.bfloat16)  # 2^-6 with the sign
    return jnp.where((bits & 0x78) == 0, value + value - least, value)


def loaded(scales, at: int, count: int, layout) -> jax.Array:
    """`count` scales from number `at` on of a page's, in float32."""
    return plgpu.load(scales.at[pl.ds(at, count)], layout=layout, optimized=False).astype(jnp.float32)


def decode(
    q: jax.Array,
    k_codes: jax.Array,
    v_codes: jax.Array,
    scales: jax.Array,
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

    Codes [N, K, P or P / 2, D], scales [N, K, X] as in `pallas_kernels.codes`. Results are
    those of `split.launch`.
    """
    _, _, rows, head_dim = q.shape
    dtype, page, n, stages = q.dtype, shape.page, shape.part, config.stages
    pages, parts = config.tile // page, shape.step(config.tile)
    mma = Mma(dtype, shape.row_warps)
    row_layout = mma.acc.reduce(1)
    has_zeros = shape.codec == "int4"
    keys_end = head_dim * (2 if has_zeros else 1)
    pieces = shape.scale_pieces

    def body(
        q_ref, k_ref, v_ref, scales_ref, ids_ref, first_ref, stop_ref, out_ref, top_ref, total_ref,
        q_tile, q_ready, k_ring, v_ring, scales_ring, p_tiles, v_tile, k_ready, v_ready,
    ):  # fmt: skip
        here = Part.here(first_ref, stop_ref, shape, config, page, pages)
        first, stop, begin, steps, head = here.first, here.stop, here.begin, here.steps, here.head

        def page_at(step, i):
            # Past the end the last page comes again: what is not listed is never looked up.
            return tiles.page_of(ids_ref, here.row, here.of_list, jnp.minimum(begin + step * pages + i, here.end - 1))

        def fetch_keys(step, slot):
            for i in range(pages):
                physical = page_at(step, i)
                plgpu.copy_gmem_to_smem(k_ref.at[physical, head], k_ring.at[slot, i], k_ready.at[slot])
                for at, count in pieces:
                    piece = pl.ds(at, count)
                    plgpu.copy_gmem_to_smem(
                        scales_ref.at[physical, head, piece], scales_ring.at[slot, i, piece], k_ready.at[slot]
                    )

        def fetch_values(step, slot):
            for i in range(pages):
                plgpu.copy_gmem_to_smem(v_ref.at[page_at(step, i), head], v_ring.at[slot, i], v_ready.at[slot])

        def fetch_both(step, slot):
            fetch_keys(step, slot)
            fetch_values(step, slot)

        here.start(q_ref, q_tile, q_ready, stages, fetch_both)
        query = plgpu.load(q_tile, layout=mma.lhs)

        def scale_of(slot, page, at, count, layout):
            return loaded(scales_ring.at[slot, page], at, count, layout)

        def step_over(step, carry):
            acc, top, total, zeros = carry
            slot = lax.rem(step, jnp.int32(stages))
            base = (begin + step * pages) * page
            tiles.wait(k_ready.at[slot])
            scores, seen, value_scales, value_zeros = [], [], [], []
            scaled, key_zeros = {}, {}
            for part in parts:
                if part.page not in scaled:
                    by = scale_of(slot, part.page, 0, head_dim, mma.lhs.reduce(0))
                    by = tiles.placed(by, query.shape, 1, mma.lhs)
                    scaled[part.page] = (query.astype(jnp.float32) * by).astype(dtype)
                    if has_zeros:
                        zero = scale_of(slot, part.page, head_dim, head_dim, mma.rhs.reduce(1)).astype(dtype)
                        key_zeros[part.page] = tiles.placed(zero, (head_dim, n), 0, mma.rhs)
                ring = k_ring.at[slot, part.page, pl.ds(part.first, n)].transpose((1, 0))
                s = mma.dot(
                    constant((rows, n), 0.0, mma.acc),
                    scaled[part.page],
                    opened(plgpu.load(ring, layout=mma.rhs), part.shift),
                )
                if has_zeros:
                    s = mma.dot(s, query, key_zeros[part.page])
                s = tiles.capped(s * scale, soft_cap) * LOG2E if soft_cap else s * (scale * LOG2E)
                at = plgpu.broadcasted_iota(jnp.int32, (rows, n), 1, layout=mma.acc)
                seen.append(tiles.visible(at + (base + part.page * page + part.token), first, stop))
                scores.append(jnp.where(seen[-1], s, HIDDEN))
                by_token = mma.acc.reduce(0)
                value_scales.append(scale_of(slot, part.page, keys_end + part.token, n, by_token))
                if has_zeros:
                    value_zeros.append(scale_of(slot, part.page, keys_end + page + part.token, n, by_token))
            higher = top
            for s in scores:
                higher = jnp.maximum(higher, plgpu.layout_cast(s.max(axis=1), row_layout))
            decay = jnp.exp2(top - higher)
            rescale = tiles.placed(decay, (rows, n), 0, mma.acc)
            shift = tiles.placed(higher, (rows, n), 0, mma.acc)
            total, zeros = total * rescale, zeros * rescale
            for index, s in enumerate(scores):
                # The scales of tokens that are not there may be NaN: select after multiplying.
                weights = jnp.exp2(s - shift)
                by = tiles.placed(value_scales[index], s.shape, 1, mma.acc)
                p_tiles.at[index][...] = jnp.where(seen[index], weights * by, 0.0).astype(dtype)
                total += jnp.where(seen[index], weights, 0.0)
                if has_zeros:
                    by = tiles.placed(value_zeros[index], s.shape, 1, mma.acc)
                    zeros += jnp.where(seen[index], weights * by, 0.0)

            @pl.when(step + stages < steps)
            def _next_keys():
                fetch_keys(step + stages, slot)

            acc = acc * tiles.placed(decay, acc.shape, 0, mma.acc)
            tiles.wait(v_ready.at[slot])
            for index, part in enumerate(parts):
                # Bytes load only along their rows; products want values along columns.
                stored = v_ring.at[slot, part.page, pl.ds(part.first, n)].transpose((1, 0))
                v_tile.transpose((1, 0))[...] = opened(plgpu.load(stored, layout=mma.rhs), part.shift)
                values = plgpu.load(v_tile, layout=mma.rhs)
                acc = mma.dot(acc, plgpu.load(p_tiles.at[index], layout=mma.lhs), values)

            @pl.when(step + stages < steps)
            def _next_values():
                fetch_values(step + stages, slot)

            return acc, higher, total, zeros

        acc, top, total, zeros = lax.fori_loop(
            0,
            steps,
            step_over,
            (
                constant((rows, head_dim), 0.0, mma.acc),
                constant((rows,), HIDDEN, row_layout),
                constant((rows, n), 0.0, mma.acc),
                constant((rows, n), 0.0, mma.acc),
            ),
        )

        written = lambda: acc + spread(zeros.sum(axis=1), acc) if has_zeros else acc  # noqa: E731
        here.write(out_ref, top_ref, total_ref, written, top, total)

    stored = k_codes.dtype
    ring = plgpu.SMEM((stages, pages, shape.byte_rows, head_dim), stored, transforms=tiles.swizzled(head_dim, stored))
    scratch = [
        ring,
        ring,
        plgpu.SMEM((stages, pages, shape.padded_scales(scales.dtype.itemsize)), scales.dtype),
        plgpu.SMEM((len(parts), rows, n), dtype, transforms=tiles.swizzled(n, dtype)),
        plgpu.SMEM((n, head_dim), dtype, transforms=tiles.swizzled(head_dim, dtype)),
        plgpu.Barrier(num_arrivals=pages * (1 + len(pieces)), num_barriers=stages),
        plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
    ]
    operands = (k_codes, v_codes, scales, page_ids, first, stop)
    return launch(body, q, operands, config.splits, scratch, "quantized_decode_attention")
