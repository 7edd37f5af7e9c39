"""The one Mosaic TPU attention kernel over page lists: decode and prefill, plain and coded pools, are thin
callers.

Work is a flat list of programs. A program is one block of query rows of one sequence together with one page
list: all KV heads when the heads share a list (a page is then one copy of [K, P, D]), one KV head when each
has its own. Programs run in order on a core, and what the next one needs is always on its way while this one
computes:

* page ids live in HBM and come to scalar memory in chunks of 128, one chunk ahead of the page copies;
* page blocks are double buffered in VMEM, one block ahead of the arithmetic, across program borders.

A block whose tokens are all visible to all its query rows takes a branch without masks. Tokens that no query
of the program sees, and the buffers of pages that were not copied, are zeroed before the second product, so
dead pages may hold anything.
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

from pallas_kernels.mosaic_tpu import coded
from pallas_kernels.mosaic_tpu.limits import VMEM

NEG = -1e30
LANES = 128
IDS = 128  # page ids per chunk in scalar memory
TILE = 128  # query rows of a KV head that are computed at once
# words of the state kept in scalar memory between programs
_PRIMED, _BUFFER, _CHUNK, _OWNER = 0, 1, 2, 3  # _OWNER + buffer: the id chunk that buffer was filled from


@dataclass(frozen=True)
class Spec:
    """What is static in a kernel: shapes, options, block sizes."""

    page: int  # P, tokens of a page
    pages: int  # pages of a block
    heads: int  # KV heads of a program
    per_head: bool  # each KV head has its own list
    logical: bool  # lists carry logical ids (otherwise entry j is page j of the sequence)
    group: int  # G, query heads per KV head
    tokens: int  # query tokens of a program
    scale: float
    window: int | None
    soft_cap: float | None
    joint: bool  # K and V share one pool, side by side
    lse: bool
    dtype: jnp.dtype  # of the products' operands
    head_dim: int
    codec: str | None = None  # pools hold codes, the last pool their scales

    @property
    def width(self) -> int:
        return self.page * self.pages


@dataclass(frozen=True)
class Work:
    """Per program, int32 [R]: entries [start, stop) of list `row`, query positions first..last.

    R = items * lists per item."""

    row: jax.Array
    start: jax.Array
    stop: jax.Array
    first: jax.Array
    last: jax.Array


def _kernel(row, start, stop, first, last, ids_hbm, q_ref, *refs, spec: Spec, per_core: int):
    pools = (1 if spec.joint else 2) + (spec.codec is not None)
    outs = 2 if spec.lse else 1
    pools_hbm, (o_ref, *lse_ref), refs = refs[:pools], refs[pools : pools + outs], refs[pools + outs :]
    buffers, (ids, state, acc, top, mass, ids_sem, page_sem, *sides) = refs[:pools], refs[pools:]
    stored = buffers if spec.codec is None else buffers[:-1]
    key_sides, value_sides = sides[: len(sides) // 2], sides[len(sides) // 2 :]
    n, P = spec.pages, spec.page
    core, step = pl.program_id(0), pl.program_id(1)
    me, end = core * per_core + step, (core + 1) * per_core

    def has_work(r):
        return stop[r] > start[r]

    def next_program(r):
        return lax.while_loop(
            lambda x: jnp.logical_and(x < end, jnp.logical_not(has_work(jnp.minimum(x, end - 1)))),
            lambda x: x + 1,
            r + 1,
        )

    def chunk_copy(r, chunk, slot):
        return pltpu.make_async_copy(ids_hbm.at[row[r], chunk], ids.at[slot], ids_sem.at[slot])

    def page_copies(r, page_id, buffer, j):
        for pool, buf in zip(pools_hbm, buffers, strict=True):
            source, target = pool.at[page_id], buf.at[buffer, :, j]
            if buf.ndim == 4:  # scales: of all heads, as those of one are no whole tile
                target = buf.at[buffer, j]
            elif spec.per_head:
                source, target = pool.at[page_id, lax.rem(r, pool.shape[1])], buf.at[buffer, 0, j]
            yield pltpu.make_async_copy(source, target, page_sem.at[buffer])

    def entries(r, block):
        """Listed entries of the block, relative to its first."""
        return jnp.maximum(start[r] - block * n, 0), jnp.minimum(stop[r] - block * n, n)

    def fetch(r, block, buffer):
        """Start the copies of a block; on entering an id chunk, wait for it and start the one after."""
        at = lax.rem(block * n, IDS)

        @pl.when(jnp.logical_or(at == 0, block == lax.div(start[r], n)))
        def _():
            slot = lax.rem(state[_CHUNK] + 1, 3)
            state[_CHUNK] = slot
            chunk = lax.div(block * n, IDS)
            chunk_copy(r, chunk, slot).wait()
            ahead = lax.rem(slot + 1, 3)
            more = (chunk + 1) * IDS < stop[r]

            @pl.when(more)
            def _():
                chunk_copy(r, chunk + 1, ahead).start()

            @pl.when(jnp.logical_not(more))
            def _():
                following = next_program(r)

                @pl.when(following < end)
                def _():
                    chunk_copy(following, lax.div(start[following], IDS), ahead).start()

        slot = state[_CHUNK]
        state[_OWNER + buffer] = slot
        low, high = entries(r, block)

        @pl.loop(low, high)
        def _(j):
            for copy in page_copies(r, ids[slot, 0, at + j], buffer, j):
                copy.start()

    def fetch_after(r, block, buffer):
        inside = block + 1 < lax.div(stop[r] + n - 1, n)

        @pl.when(inside)
        def _():
            fetch(r, block + 1, buffer)

        @pl.when(jnp.logical_not(inside))
        def _():
            following = next_program(r)

            @pl.when(following < end)
            def _():
                fetch(following, lax.div(start[following], n), buffer)

    def attend(block, buffer, masked: bool):
        low, high = entries(me, block)
        slot, at = state[_OWNER + buffer], lax.rem(block * n, IDS)
        tile = min(q_ref.shape[1], TILE)
        tiles = q_ref.shape[1] // tile

        def positions(shape, dim):
            """Position of each of the block's tokens; a large one for entries that are not listed."""
            token = lax.broadcasted_iota(jnp.int32, shape, dim)
            entry, offset = coded.place_of(token, P, n, spec.codec)
            far = jnp.int32(1 << 30)
            if not spec.logical:
                here = jnp.logical_and(entry >= low, entry < high)
                return jnp.where(here, block * spec.width + entry * P + offset, far)
            place = jnp.full(shape, far)
            for j in range(n):
                listed = jnp.logical_and(j >= low, j < high)
                base = jnp.where(listed, ids[slot, 1, at + j] * P, far)
                place = jnp.where(entry == j, base + offset, place)
            return place

        def sees(tile_index):
            """Which of the block's tokens the query rows of a tile see."""
            query = first[me]
            if spec.tokens > 1:
                index = tile_index * tile + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
                query = jnp.minimum(first[me] + lax.div(index, spec.group), last[me])
            seen = place <= query
            if spec.window is not None:
                seen = jnp.logical_and(seen, place > query - spec.window)
            return seen

        if masked:
            place = positions((1, spec.width), 1)
            alive = (column := positions((spec.width, 1), 0)) <= last[me]
            if spec.window is not None:
                alive = jnp.logical_and(alive, column > first[me] - spec.window)
        per = max(h for h in range(1, spec.heads + 1) if spec.heads % h == 0 and (h == 1 or h * tile <= 64))
        per = 1 if spec.codec else per
        precision = lax.Precision.HIGHEST if spec.dtype == jnp.float32 else None
        if spec.codec is not None:
            _unfold(buffers[-1].at[buffer], key_sides, value_sides, spec)

        def head_of(hs):
            """Where the scales of the only head of `hs` are."""
            return pl.ds(lax.rem(me, key_sides[0].shape[1]) if spec.per_head else hs.start, 1)

        def operands(hs):
            """Keys and values [per, tokens, lanes] of some heads."""
            k, v = (buf[buffer, hs] for buf in (stored[0], stored[-1]))
            if spec.codec is not None:
                k, v = coded.widen(k[0], spec.codec), coded.widen(v[0], spec.codec)
                k = coded.scale_keys(k, *(side[:, head_of(hs)] for side in key_sides))
            return (x.reshape(per, spec.width, x.shape[-1]).astype(spec.dtype) for x in (k, v))

        def some_rows(i, _):
            hs, rows = pl.ds(lax.div(i, tiles) * per, per), pl.ds(lax.rem(i, tiles) * tile, tile)
            seen = sees(lax.rem(i, tiles)) if masked else None
            k, v = operands(hs)
            s = jnp.einsum(
                "hmd,htd->hmt", q_ref[hs, rows], k, precision=precision, preferred_element_type=jnp.float32
            )
            s = s * spec.scale
            if spec.soft_cap is not None:
                s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
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

    @pl.when(step == 0)
    def _():
        state[_PRIMED] = 0

    @pl.when(jnp.logical_and(has_work(me), state[_PRIMED] == 0))
    def _():
        state[_PRIMED] = 1
        state[_BUFFER] = 0
        state[_CHUNK] = 2
        chunk_copy(me, lax.div(start[me], IDS), 0).start()
        fetch(me, lax.div(start[me], n), 0)

    top[...] = jnp.full(top.shape, NEG, jnp.float32)
    mass[...] = jnp.zeros(mass.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.when(has_work(me))
    def _():
        @pl.loop(lax.div(start[me], n), lax.div(stop[me] + n - 1, n))
        def _(block):
            buffer = state[_BUFFER]
            fetch_after(me, block, 1 - buffer)
            low, high = entries(me, block)

            @pl.loop(low, high)
            def _(j):
                for copy in page_copies(me, 0, buffer, j):
                    copy.wait()

            lowest, highest = block * n + low, block * n + high - 1
            if spec.logical:
                slot, at = state[_OWNER + buffer], lax.rem(block * n, IDS)
                lowest, highest = ids[slot, 1, at + low], ids[slot, 1, at + high - 1]
            plain = jnp.logical_and(high - low == n, highest * P + P - 1 <= first[me])
            if spec.window is not None:
                plain = jnp.logical_and(plain, lowest * P > last[me] - spec.window)
            pl.when(plain)(lambda: attend(block, buffer, masked=False))
            pl.when(jnp.logical_not(plain))(lambda: attend(block, buffer, masked=True))
            state[_BUFFER] = 1 - buffer

    total = mass[...]
    o_ref[...] = (acc[...] / jnp.maximum(total[:, :, :1], 1e-37)).astype(o_ref.dtype)
    for ref in lse_ref:
        sums = jnp.where(total > 0, top[...] + jnp.log(jnp.maximum(total, 1e-37)), NEG)
        for head in range(spec.heads):
            ref[head] = sums[head].T[:1]


def _bytes_of_token(pool: jax.Array, page: int) -> int:
    """Bytes of a KV head's token in a pool [N, K, ..]."""
    return math.prod(pool.shape[2:]) * pool.dtype.itemsize // page


def _unfold(scales, key_sides, value_sides, spec: Spec) -> None:
    """Scales of a block's pages [n, K, X] into those of keys [n, K, M] and of values [K, tokens]."""
    values = []
    for j in range(spec.pages):
        keys, of_values = coded.unfold(
            scales[j].astype(jnp.float32), spec.head_dim, spec.page, spec.codec
        )
        for ref, key in zip(key_sides, keys, strict=True):
            ref[j] = key[:, : ref.shape[2]]
        values.append(of_values)
    for ref, pages in zip(value_sides, zip(*values, strict=True), strict=True):
        ref[...] = coded.row_of_tokens(list(pages), spec.page, spec.codec)


def block_pages(heads: int, page: int, lanes: int, itemsize: int, listed: int, most: int) -> int:
    """Pages of a block: about 1 MiB of K and V per buffer, between 128 and `most` tokens, a power of two."""
    tokens = 128
    while tokens < most and 2 * heads * tokens * 2 * lanes * itemsize <= 1 << 20:
        tokens *= 2
    while tokens > 128 and tokens >= 2 * page * listed:
        tokens //= 2
    return max(1, min(tokens // page, IDS))


def chunked_ids(page_ids: jax.Array, logical_ids: jax.Array | None) -> jax.Array:
    """[B, Kl, J] -> [B * Kl, chunks, 1 or 2, IDS]: physical ids, then logical ids, as the kernel streams
    them."""
    lists = [page_ids] if logical_ids is None else [page_ids, jnp.broadcast_to(logical_ids, page_ids.shape)]
    J = page_ids.shape[-1]
    chunks = pl.cdiv(J, IDS)
    lists = [
        jnp.pad(x.reshape(-1, J), ((0, 0), (0, chunks * IDS - J))).reshape(-1, chunks, 1, IDS) for x in lists
    ]
    return jnp.concatenate(lists, axis=2).astype(jnp.int32)


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
    buffer = (2, spec.heads, spec.pages, spec.page // coded.halves(spec.codec), lanes)
    buffers = [pltpu.VMEM(buffer, pool.dtype) for pool in pools]
    sides = []
    if spec.codec is not None:
        buffers[-1] = pltpu.VMEM((2, spec.pages, *pools[-1].shape[1:]), pools[-1].dtype)
        shapes = [(spec.pages, K, lanes), (K, max(spec.width, LANES))]
        sides = [pltpu.VMEM(shape, jnp.float32) for shape in shapes for _ in range(coded.halves(spec.codec))]

    def block(*minor):
        def place(core, step, *_):
            program = core * per_core + step
            return lax.div(program, lists), lax.rem(program, lists), 0, 0

        return pl.BlockSpec((None, spec.heads, *minor), place)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    tokens_read = programs * spec.heads * ids.shape[1] * IDS * spec.page
    out = pl.pallas_call(
        functools.partial(_kernel, spec=spec, per_core=per_core),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, per_core),
            in_specs=[in_hbm, block(M, lanes)] + [in_hbm] * len(pools),
            out_specs=[block(M, lanes)] + [block(1, M)] * spec.lse,
            scratch_shapes=buffers
            + [
                pltpu.SMEM((3, *ids.shape[2:]), jnp.int32),
                pltpu.SMEM((8,), jnp.int32),
                pltpu.VMEM((spec.heads, M, lanes), jnp.float32),
                pltpu.VMEM((spec.heads, M, LANES), jnp.float32),
                pltpu.VMEM((spec.heads, M, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((3,)),
                pltpu.SemaphoreType.DMA((2,)),
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
