"""Probability that queries give to what their rows' lists hold, on TPU: the kernel.

`stream` brings the keys. Programs of one list come one after another, so that what they give adds up in VMEM.
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
from pallas_kernels.mosaic_tpu.limits import VMEM, require
from pallas_kernels.mosaic_tpu.stream import Stream, Work

LANES = 128


@dataclass(frozen=True)
class Spec(stream.Spec):
    """What is static in a call.

    A program has `rounds` x `rows` queries: the largest of those in the same row of each round counts, then rows add
    up (or, with `largest`, the largest of them counts). Row m of a round belongs to token m / `each` of the program.
    """

    rounds: int = 1
    rows: int = 8
    each: int = 1
    largest: bool = False
    per_token: bool = False
    head_dim: int = 0

    @property
    def lanes(self) -> int:
        """Numbers given per block: one per token, or one per page and what fills a tile."""
        return self.width if self.per_token else LANES


def _kernel(
    row, start, stop, first, last, ids_hbm, q_ref, norms_ref, *refs, spec: Spec, items: int
):
    count = 1 if spec.codec is None else 2
    pools, o_ref, buffers, refs = refs[:count], refs[count], refs[count + 1 : 2 * count + 1], refs[2 * count + 1 :]
    ids, state, ids_sem, page_sem, *sides = refs
    me, end = pl.program_id(0), pl.num_programs(0)
    pages = Stream(
        *(spec, row, start, stop, first, last, ids_hbm, pools, buffers, ids, state, ids_sem, page_sem, me, end),
        head_of=lambda r: lax.div(r, items),
    )
    largest_first = spec.largest or spec.rounds > 1

    def by_page(weights):
        """Sums [h, m, lanes] over the tokens of each page."""
        shape = (spec.width, LANES)
        token, page = (lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
        of_page = (coded.place_of(token, spec.page, spec.pages, spec.codec)[0] == page).astype(jnp.float32)
        return jnp.einsum("hmt,tn->hmn", weights, of_page, precision=lax.Precision.HIGHEST)

    def weigh(block, buffer, masked: bool):
        if masked:
            turn = lax.rem(lax.broadcasted_iota(jnp.int32, (spec.rounds * spec.rows, 1), 0), spec.rows)
            query = jnp.minimum(first[me] + lax.div(turn, spec.each), last[me])
            seen = pages.sees(pages.positions(block, buffer, (1, spec.width), 1), query)
        per = 1 if spec.codec else stream.heads_at_once(spec.heads, spec.rounds * spec.rows)
        if spec.codec is not None:
            coded.unfold_block(buffers[1].at[buffer], sides, spec.head_dim, spec.page, spec.codec)

        def some_heads(i, _):
            hs = pl.ds(i * per, per)
            k = buffers[0][buffer, hs]
            if spec.codec is not None:
                k = coded.keys(k[0], sides, pl.ds(pages.head_of(me) if spec.per_head else i, 1), spec.codec)
            k = k.reshape(per, spec.width, k.shape[-1]).astype(spec.dtype)
            weights = jnp.exp(stream.scores(q_ref[hs], k, spec) - norms_ref[hs])
            if masked:
                weights = jnp.where(seen[None], weights, 0)
            if largest_first and not spec.per_token:
                weights = by_page(weights)
            rounds = [weights[:, spec.rows * r : spec.rows * (r + 1)] for r in range(spec.rounds)]
            weights = functools.reduce(jnp.maximum, rounds)
            weights = (jnp.max if spec.largest else jnp.sum)(weights, axis=1, keepdims=True)
            if not largest_first and not spec.per_token:
                weights = by_page(weights)
            o_ref[hs, pl.ds(block, 1)] += weights

        lax.fori_loop(0, spec.heads // per, some_heads, None)

    @pl.when(jnp.logical_or(me == 0, row[me] != row[jnp.maximum(me - 1, 0)]))
    def _():
        o_ref[...] = jnp.zeros(o_ref.shape, jnp.float32)

    pages.run(me, weigh)


def mass(q, norms, pools, ids, work: Work, lists: int, spec: Spec, *, interpret=False) -> jax.Array:
    """Mass [lists, heads, blocks, lanes] float32 under q [I, K, rounds * M, D'] with log-sum-exp `norms` [I, K,
    rounds * M, 1], of so many lists.

    `pools` are the keys and, where they are coded, their scales; tokens of a block are then in the order of
    `coded.place_of`. `ids` as `chunked_ids` makes them. The programs of `work` are ordered by KV head where each has
    its own list, then by item. What lies in no block that a program reads is 0 where its list has a program, else
    unwritten.
    """
    items, _, rows, lanes = q.shape
    entries = ids.shape[1] * ids.shape[3]
    blocks = entries // spec.pages
    kv_heads = pools[0].shape[1]
    buffers, sides = [stream.page_buffers(pools[0], spec)], []
    if spec.codec is not None:
        buffers.append(stream.scale_buffers(pools[1], spec))
        sides = [pltpu.VMEM((spec.pages, kv_heads, lanes), jnp.float32)] * coded.halves(spec.codec)
    used = 8 * spec.heads * -(-blocks // 8) * 8 * spec.lanes
    require(used <= VMEM // 4 * 3, f"what a list is given takes {used} bytes, twice; {VMEM} are there for all")

    def of_item(width):
        return pl.BlockSpec(
            (None, spec.heads, rows, width), lambda r, *_: (lax.rem(r, items), lax.div(r, items), 0, 0)
        )

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    out = (spec.heads, blocks, spec.lanes)
    tokens_read = work.row.shape[0] * spec.heads * entries * spec.page
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec, items=items),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(work.row.shape[0],),
            in_specs=[in_hbm, of_item(lanes), of_item(1)] + [in_hbm] * len(pools),
            out_specs=pl.BlockSpec((None, *out), lambda r, row, *_: (row[r], 0, 0, 0)),
            scratch_shapes=[*buffers, *stream.scratch(ids), *sides],
        ),
        out_shape=jax.ShapeDtypeStruct((lists, *out), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens_read * rows * lanes,
            bytes_accessed=tokens_read * sum(math.prod(p.shape[2:]) * p.dtype.itemsize for p in pools) // spec.page,
            transcendentals=tokens_read * rows,
        ),
        interpret=interpret,
        name="attention_mass",
    )(work.row, work.start, work.stop, work.first, work.last, ids, q, norms, *pools)
