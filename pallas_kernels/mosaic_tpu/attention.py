"""The one Mosaic TPU attention kernel over page lists: decode and prefill, plain and coded pools, are thin
callers.

`stream` brings the pages; here are the arithmetic of a block and the softmax over blocks. Tokens that no query of the
program sees, and the buffers of pages that were not copied, are zeroed before the second product, so dead pages may
hold anything.
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

from pallas_kernels.mosaic_tpu import coded, stream
from pallas_kernels.mosaic_tpu.limits import VMEM
from pallas_kernels.mosaic_tpu.stream import Stream, Work

NEG = -1e30
LANES = 128
TILE = 128  # query rows of a KV head that are computed at once


@dataclass(frozen=True)
class Spec(stream.Spec):
    """What is static in a call of attention."""

    group: int = 1  # G, query heads per KV head
    tokens: int = 1  # query tokens of a program
    joint: bool = False  # K and V share one pool, side by side
    lse: bool = False
    head_dim: int = 0


def _kernel(row, start, stop, first, last, ids_hbm, q_ref, *refs, spec: Spec, per_core: int):
    pools = (1 if spec.joint else 2) + (spec.codec is not None)
    outs = 2 if spec.lse else 1
    pools_hbm, (o_ref, *lse_ref), refs = refs[:pools], refs[pools : pools + outs], refs[pools + outs :]
    buffers, (ids, state, ids_sem, page_sem, acc, top, mass, *sides) = refs[:pools], refs[pools:]
    stored = buffers if spec.codec is None else buffers[:-1]
    key_sides, value_sides = sides[: len(sides) // 2], sides[len(sides) // 2 :]
    core, step = pl.program_id(0), pl.program_id(1)
    me, end = core * per_core + step, (core + 1) * per_core
    pages = Stream(
        *(spec, row, start, stop, first, last, ids_hbm, pools_hbm, buffers, ids, state, ids_sem, page_sem, me, end),
        head_of=lambda r: lax.rem(r, pools_hbm[0].shape[1]),
    )

    def attend(block, buffer, masked: bool):
        tile = min(q_ref.shape[1], TILE)
        tiles = q_ref.shape[1] // tile

        def sees(tile_index):
            """Which of the block's tokens the query rows of a tile see."""
            query = first[me]
            if spec.tokens > 1:
                index = tile_index * tile + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
                query = jnp.minimum(first[me] + lax.div(index, spec.group), last[me])
            return pages.sees(place, query)

        if masked:
            place = pages.positions(block, buffer, (1, spec.width), 1)
            alive = (column := pages.positions(block, buffer, (spec.width, 1), 0)) <= pages.newest(last[me])
            if spec.window is not None:
                alive = jnp.logical_and(alive, column > first[me] - spec.window)
        per = 1 if spec.codec else stream.heads_at_once(spec.heads, tile)
        precision = lax.Precision.HIGHEST if spec.dtype == jnp.float32 else None
        if spec.codec is not None:
            sides = coded.unfold_block(buffers[-1].at[buffer], key_sides, spec.head_dim, spec.page, spec.codec)
            for ref, pages_of in zip(value_sides, sides, strict=True):
                ref[...] = coded.row_of_tokens(pages_of, spec.page, spec.codec)

        def head_of(hs):
            """Where the scales of the only head of `hs` are."""
            return pl.ds(lax.rem(me, key_sides[0].shape[1]) if spec.per_head else hs.start, 1)

        def operands(hs):
            """Keys and values [per, tokens, lanes] of some heads."""
            k, v = (buf[buffer, hs] for buf in (stored[0], stored[-1]))
            if spec.codec is not None:
                k = coded.keys(k[0], key_sides, head_of(hs), spec.codec)
                v = coded.widen(v[0], spec.codec)
            return (x.reshape(per, spec.width, x.shape[-1]).astype(spec.dtype) for x in (k, v))

        def some_rows(i, _):
            hs, rows = pl.ds(lax.div(i, tiles) * per, per), pl.ds(lax.rem(i, tiles) * tile, tile)
            seen = sees(lax.rem(i, tiles)) if masked else None
            k, v = operands(hs)
            s = stream.scores(q_ref[hs, rows], k, spec)
            if masked:
                s = jnp.where(seen[None], s, NEG)
                v = jnp.where(alive[None], v, 0)
            old = top[hs, rows]
            new = jnp.maximum(old, jnp.max(s, axis=2, keepdims=True))
            p = jnp.exp(s - new[:, :, :1])
            if masked:
                p = jnp.where(seen[None], p, 0)
            decay = jnp.exp(old - new)
            top[hs, rows] = new
            mass[hs, rows] = mass[hs, rows] * decay + jnp.sum(p, axis=2, keepdims=True)
            scaled = [p * side[head_of(hs)][None] for side in value_sides] or [p]
            if masked and value_sides:  # scales of dead tokens may be NaN
                scaled = [jnp.where(seen[None], x, 0) for x in scaled]
            pv = jnp.einsum(
                "hmt,htd->hmd",
                scaled[0].astype(spec.dtype),
                v,
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            for zeros in scaled[1:]:
                pv = pv + jnp.sum(zeros, axis=2, keepdims=True)
            acc[hs, rows] = acc[hs, rows] * decay[:, :, :1] + pv

        lax.fori_loop(0, spec.heads // per * tiles, some_rows, None)

    top[...] = jnp.full(top.shape, NEG, jnp.float32)
    mass[...] = jnp.zeros(mass.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)
    pages.run(step, attend)
    total = mass[...]
    o_ref[...] = (acc[...] / jnp.maximum(total[:, :, :1], 1e-37)).astype(o_ref.dtype)
    for ref in lse_ref:
        sums = jnp.where(total > 0, top[...] + jnp.log(jnp.maximum(total, 1e-37)), NEG)
        for head in range(spec.heads):
            ref[head] = sums[head].T[:1]


def _bytes_of_token(pool: jax.Array, page: int) -> int:
    """Bytes of a KV head's token in a pool [N, K, ..]."""
    return math.prod(pool.shape[2:]) * pool.dtype.itemsize // page


def attend_lists(q, pools, ids, work: Work, spec: Spec, *, out_dtype, interpret=False):
    """Attention of I items of query rows over their page lists.

    q [I, K, M, D'] (M = tokens * group rows, padded to a multiple of 8), pools: one or two arrays
    [N, K, P, D'], where they are coded also the scales [N, K, X], ids as `chunked_ids` makes them. Returns
    out [I, K, M, D'] of out_dtype and lse [I, K, M] float32 (None unless spec.lse).
    """
    items, K, M, lanes = q.shape
    lists = K if spec.per_head else 1
    programs = items * lists
    cores = 2 if programs % 2 == 0 else 1
    per_core = programs // cores
    buffers = [stream.page_buffers(pool, spec) for pool in pools]
    sides = []
    if spec.codec is not None:
        buffers[-1] = stream.scale_buffers(pools[-1], spec)
        shapes = [(spec.pages, K, lanes), (K, max(spec.width, LANES))]
        sides = [pltpu.VMEM(shape, jnp.float32) for shape in shapes for _ in range(coded.halves(spec.codec))]

    def block(*minor):
        def place(core, step, *_):
            program = core * per_core + step
            return lax.div(program, lists), lax.rem(program, lists), 0, 0

        return pl.BlockSpec((None, spec.heads, *minor), place)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    tokens_read = programs * spec.heads * ids.shape[1] * ids.shape[3] * spec.page
    out = pl.pallas_call(
        functools.partial(_kernel, spec=spec, per_core=per_core),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, per_core),
            in_specs=[in_hbm, block(M, lanes)] + [in_hbm] * len(pools),
            out_specs=[block(M, lanes)] + [block(1, M)] * spec.lse,
            scratch_shapes=buffers
            + stream.scratch(ids)
            + [
                pltpu.VMEM((spec.heads, M, lanes), jnp.float32),
                pltpu.VMEM((spec.heads, M, LANES), jnp.float32),
                pltpu.VMEM((spec.heads, M, LANES), jnp.float32),
            ]
            + sides,
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, out_dtype)]
        + [jax.ShapeDtypeStruct((items, K, 1, M), jnp.float32)] * spec.lse,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * tokens_read * M * lanes,
            bytes_accessed=tokens_read * sum(_bytes_of_token(pool, spec.page) for pool in pools),
            transcendentals=tokens_read * M,
        ),
        interpret=interpret,
        name="paged_attention",
    )(work.row, work.start, work.stop, work.first, work.last, ids, q, *pools)
    return out[0], out[1][:, :, 0] if spec.lse else None
