"""The Mosaic TPU kernel of decode attention over DeltaKV latents: keys rebuilt in VMEM, values absorbed.

`stream` brings a page's latents and their scales, and every center that it names as one copy of [K, 2D]; a page has a
place for each of its tokens among its latents, and its centers, which have none, stand behind the others with z = 0.
The centers of a block's pages lie one below the other, so that the bases of all its tokens are one product with a
matrix of which token takes which center; center scales multiply that matrix, those of V what the tokens of a center
weigh together.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.deltakv import Grid
from pallas_kernels.mosaic_tpu import stream
from pallas_kernels.mosaic_tpu.limits import VMEM
from pallas_kernels.mosaic_tpu.stream import Stream, Work

NEG = -1e30
LANES = 128
NAMED = LANES  # centers that a block's pages name, at most
TOKENS = 512  # of a block, at most


@dataclass(frozen=True)
class Spec(stream.Spec):
    """What is static in a call: also the grid of the pages and the head groups of the compressor."""

    grid: Grid = Grid()
    groups: int = 1
    lse: bool = False

    @property
    def named(self) -> int:
        """Centers that come with a page: its own, then those that it refers to."""
        return named(self.grid)


def named(grid: Grid) -> int:
    """Centers that come with a page."""
    return grid.own + grid.references


def block_pages(grid: Grid) -> int:
    """Pages of a block, a power of two; 0 where one alone names too many centers."""
    pages = min(NAMED // named(grid), max(1, TOKENS // grid.page_size))
    return 1 << pages.bit_length() >> 1


class Latents(Stream):
    """`Stream` of latents, their scales and centers, in this order, and of what `beside` says of each block."""

    def page_copies(self, r, word, buffer, j):
        latents, scales, centers, *_ = self.pools
        page, count = word(0), self.spec.named
        to_latents, to_scales, to_centers, *_ = self.buffers
        sem = self.page_sem.at[buffer]
        yield pltpu.make_async_copy(latents.at[page], to_latents.at[buffer, :, j], sem)
        yield pltpu.make_async_copy(scales.at[page], to_scales.at[buffer, :, j], sem)
        for i in range(count):
            center = word(1 + self.spec.logical + i)
            yield pltpu.make_async_copy(centers.at[center], to_centers.at[buffer, j * count + i], sem)

    def block_copies(self, r, block, buffer):
        for side, target in zip(self.pools[3:], self.buffers[3:], strict=True):
            yield pltpu.make_async_copy(side.at[self.row[r], block], target.at[buffer], self.page_sem.at[buffer])

    def place_of(self, token):
        entry, at = super().place_of(token)
        grid = self.spec.grid
        span = grid.stride - 1
        other = lax.div(at, span) * grid.stride + 1 + lax.rem(at, span)
        return entry, jnp.where(at < grid.others, other, (at - grid.others) * grid.stride)


def _kernel(row, start, stop, first, last, ids_hbm, q_ref, angle_ref, g_ref, *refs, spec: Spec, per_core: int):
    sides = 4 + (spec.grid.centers == "int8")
    outs = 1 + spec.lse
    pools, (o_ref, *lse_ref), refs = refs[:sides], refs[sides : sides + outs], refs[sides + outs :]
    buffers, refs = refs[:sides], refs[sides:]
    ids, state, ids_sem, page_sem, z_ref, wide, share, by_center, shrink, top, mass, mixed, based = refs
    latents, scales, centers, index, *center_scales = buffers
    core, step = pl.program_id(0), pl.program_id(1)
    me, end = core * per_core + step, (core + 1) * per_core
    pages = Latents(
        *(spec, row, start, stop, first, last, ids_hbm, pools, buffers, ids, state, ids_sem, page_sem, me, end),
        head_of=lambda r: 0,
    )
    heads, rows, head_dim = q_ref.shape
    n, width, groups, dtype, latent = spec.pages, spec.width, spec.groups, spec.dtype, z_ref.shape[-1]
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def dot(a, b, turned: bool = False):
        """a @ b, or a @ b.T, in float32."""
        contracted = (((1,), (1 if turned else 0,)), ((), ()))
        operands = (x.astype(dtype) for x in (a, b))
        return lax.dot_general(*operands, contracted, precision=precision, preferred_element_type=jnp.float32)

    def center_rows(head, side):
        """K (side 0) or V (side 1) of a head's centers [NAMED, D]."""
        columns = range(side * head_dim // LANES, (side + 1) * head_dim // LANES)
        return jnp.concatenate([wide.at[i][pl.ds(head, NAMED, stride=heads)] for i in columns], axis=1)

    def scaled(weights, buffer, side):
        """Weights of centers [.., NAMED] times the scales of K (2 * head) or V (2 * head + 1)."""
        return weights * center_scales[0][buffer, pl.ds(side, 1)] if center_scales else weights

    def rotate(keys, cos, sin):
        return keys * cos + pltpu.roll(keys, head_dim // 2, 1) * sin

    def consume(block, buffer, masked: bool):
        low, high = pages.entries(me, block)
        place = pages.positions(block, buffer, (1, width), 1)
        angles = pages.positions(block, buffer, (width, 1), 0).astype(jnp.float32) * angle_ref[0:1]
        cos, sin = jnp.cos(angles) * angle_ref[1:2], jnp.sin(angles) * angle_ref[2:3]
        seen = pages.sees(place, first[me]) if masked else None

        def widen(j, _):
            half_rows = latents.shape[3]
            at = lax.broadcasted_iota(jnp.int32, (half_rows, 1), 0)
            listed = jnp.logical_and(j >= low, j < high)
            for group in range(groups):
                codes = latents[buffer, group, j].astype(jnp.int32)
                side = scales[buffer, group, j].astype(jnp.float32)
                for half, part in enumerate((codes & 15, codes >> 4)):
                    z = part.astype(jnp.float32) * side[0:1] + side[1:2]
                    there = jnp.logical_and(at + half * half_rows < spec.grid.others, listed)
                    z_ref[group, half * n + j] = jnp.where(there, z, 0).astype(dtype)

        lax.fori_loop(0, n, widen, None)
        for i in range(wide.shape[0]):  # strided loads take one column of lanes
            column = centers[buffer, :, :, i * LANES : (i + 1) * LANES]
            wide[i] = column.astype(jnp.float32).reshape(wide.shape[1:])
        number = lax.broadcasted_iota(jnp.int32, (NAMED, width), 0)
        takes = sum(jnp.where(number == index[buffer, i : i + 1], 1.0, 0.0) for i in range(spec.grid.neighbours))
        takes = takes.T * (1 / spec.grid.neighbours)

        def weigh(head, _):
            z = z_ref[lax.div(head, heads // groups)].reshape(width, latent)
            keys = dot(scaled(takes, buffer, 2 * head), center_rows(head, 0)) + dot(z, g_ref[head, 0], turned=True)
            keys = rotate(keys, cos, sin).astype(dtype)
            s = stream.scores(q_ref[pl.ds(head, 1)].astype(dtype), keys[None], spec)[0]
            if masked:
                s = jnp.where(seen, s, NEG)
            old = top[head]
            new = jnp.maximum(old, jnp.max(s, axis=1, keepdims=True))
            p = jnp.exp(s - new[:, :1])
            if masked:
                p = jnp.where(seen, p, 0)
            decay = jnp.exp(old - new)
            top[head], shrink[head], share[head] = new, decay, p
            mass[head] = mass[head] * decay + jnp.sum(p, axis=1, keepdims=True)

        lax.fori_loop(0, heads, weigh, None)
        together = heads // groups
        for group in range(groups):
            of_group = slice(group * together, (group + 1) * together)
            p = share[of_group].reshape(together * rows, width)
            summed = dot(p, z_ref[group].reshape(width, latent)).reshape(together, rows, latent)
            mixed[of_group] = mixed[of_group] * shrink[of_group][:, :, :1] + summed
        by_center[...] = dot(share[...].reshape(heads * rows, width), takes).reshape(by_center.shape)

        def add_bases(head, _):
            weights = scaled(by_center[head], buffer, 2 * head + 1)
            based[head] = based[head] * shrink[head][:, :1] + dot(weights, center_rows(head, 1))

        lax.fori_loop(0, heads, add_bases, None)

    @pl.when(step == 0)
    def _():
        centers[...] = jnp.zeros(centers.shape, centers.dtype)  # those that no page names must be finite

    top[...] = jnp.full(top.shape, NEG, jnp.float32)
    for ref in (mass, mixed, based):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    pages.run(step, consume)

    def write(head, _):
        total = mass[head]
        share_of = 1 / jnp.maximum(total[:, :1], 1e-37)
        out = dot(mixed[head] * share_of, g_ref[head, 1], turned=True) + based[head] * share_of
        o_ref[head] = out.astype(o_ref.dtype)
        for ref in lse_ref:
            ref[head] = jnp.where(total > 0, top[head] + jnp.log(jnp.maximum(total, 1e-37)), NEG).T[:1]

    lax.fori_loop(0, heads, write, None)


def attend_latents(q, angles, g, pools, ids, work: Work, spec: Spec, *, interpret=False):
    """Attention of one query per row over the pages that the rows list.

    q [B, K, M, D] (M a multiple of 8), angles [3, D] per dimension the radians per position, and what multiplies cosine
    and sine, g [K, 2, D, C]; pools: latents [N, A, rows, C], their scales, centers [N * Pc, K, 2D], then per row and
    block [B, blocks, ..]: which center each token takes [k, tokens] and scales of the centers [2K, NAMED] where they
    are coded. Returns out [B, K, M, D] in q's dtype and lse [B, K, M] float32 (None unless spec.lse).
    """
    batch, heads, rows, head_dim = q.shape
    _, groups, byte_rows, latent = pools[0].shape
    cores = 2 if batch % 2 == 0 else 1
    per_core = batch // cores
    buffers = [
        pltpu.VMEM((2, groups, spec.pages, byte_rows, latent), pools[0].dtype),
        pltpu.VMEM((2, groups, spec.pages, *pools[1].shape[2:]), pools[1].dtype),
        pltpu.VMEM((2, NAMED, *pools[2].shape[1:]), pools[2].dtype),
        *(pltpu.VMEM((2, *side.shape[2:]), side.dtype) for side in pools[3:]),
    ]
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    per_row = (heads, rows)
    work_refs = [
        pltpu.VMEM((groups, 2 * spec.pages, byte_rows, latent), spec.dtype),
        f32((2 * head_dim // LANES, NAMED * heads, LANES)),
        f32((*per_row, spec.width)),
        f32((*per_row, NAMED)),
        *[f32((*per_row, LANES))] * 3,
        f32((*per_row, latent)),
        f32((*per_row, head_dim)),
    ]

    def block(*minor):
        return pl.BlockSpec((None, heads, *minor), lambda core, step, *_: (core * per_core + step, 0, 0, 0))

    whole = lambda array: pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)  # noqa: E731
    pages_read = batch * ids.shape[1] * ids.shape[3]
    page_bytes = sum(math.prod(pool.shape[1:]) * pool.dtype.itemsize for pool in pools[:2])
    page_bytes += spec.named * math.prod(pools[2].shape[1:]) * pools[2].dtype.itemsize
    out = pl.pallas_call(
        functools.partial(_kernel, spec=spec, per_core=per_core),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, per_core),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM), block(rows, head_dim), whole(angles), whole(g)]
            + [pl.BlockSpec(memory_space=pltpu.HBM)] * len(pools),
            out_specs=[block(rows, head_dim)] + [block(1, rows)] * spec.lse,
            scratch_shapes=buffers + stream.scratch(ids) + work_refs,
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)]
        + [jax.ShapeDtypeStruct((batch, heads, 1, rows), jnp.float32)] * spec.lse,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pages_read * spec.page * heads * ((head_dim + rows) * latent + 2 * head_dim * NAMED),
            bytes_accessed=pages_read * page_bytes,
            transcendentals=pages_read * spec.page * (heads * rows + 2 * head_dim),
        ),
        interpret=interpret,
        name="deltakv_decode_attention",
    )(work.row, work.start, work.stop, work.first, work.last, ids, q, angles, g, *pools)
    return out[0], out[1][:, :, 0] if spec.lse else None
