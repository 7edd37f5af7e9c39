"""`page_scores` on TPU: one program per row streams the bounds of its pages through VMEM.

A page's bounds of all KV heads are one copy [K, X]. The product of all query heads with all bounds of a block,
[K G, X] with [C K, X], is K times what is needed, but those are K times larger products of operands as they lie,
which the matrix units do while the next copies arrive; heads that do not belong together are masked out of the
maximum over the group. Queries are split into two bfloat16 parts where the bounds are bfloat16, so that scores
stay bounds.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.groups import HIDDEN
from pallas_kernels.mosaic_tpu.interpret import Interpret, mode
from pallas_kernels.mosaic_tpu.limits import VMEM, require, whole_lanes, whole_pages
from pallas_kernels.page_scores.queries import beside, split

BLOCK = 128  # pages whose bounds are multiplied at once
LISTED = 1 << 15  # list entries of a row that scalar memory holds twice


def page_scores(
    q: Array,
    bounds: Array,
    page_ids: Array,
    counts: Array,
    *,
    group: str = "max",
    scale: float,
    interpret: Interpret | None = None,
) -> Array:
    """See `pallas_kernels.page_scores`."""
    rows = q.shape[0]
    _, kv_heads, width = bounds.shape
    listed = page_ids.shape[2]
    _check(bounds, page_ids, kv_heads)
    blocks = pl.cdiv(listed, BLOCK)
    queries = beside(q, kv_heads, width, group) * scale
    groups = queries.shape[2]
    queries = queries.reshape(rows, kv_heads * groups, width)
    if bounds.dtype == jnp.bfloat16:
        queries = jnp.concatenate(split(queries, bounds.dtype), axis=1)
    ids = jnp.pad(page_ids[:, 0], ((0, 0), (0, blocks * BLOCK - listed)))
    scores = pl.pallas_call(
        functools.partial(_kernel, groups=groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows,),
            in_specs=[
                pl.BlockSpec((None, 1, blocks * BLOCK), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec((None, *queries.shape[1:]), lambda b, *_: (b, 0, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec((None, blocks, BLOCK * kv_heads), lambda b, *_: (b, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, BLOCK, kv_heads, width), bounds.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, blocks, BLOCK * kv_heads), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM),
        cost_estimate=pl.CostEstimate(
            flops=2 * ids.size * kv_heads * queries.shape[1] * width,
            bytes_accessed=ids.size * kv_heads * width * bounds.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=mode(interpret),
        name="page_scores",
    )(counts[:, 0], ids[:, None].astype(jnp.int32), queries, bounds)
    return scores.reshape(rows, -1, kv_heads)[:, :listed].swapaxes(1, 2)


def _check(bounds: Array, page_ids: Array, kv_heads: int) -> None:
    """Declines what the kernel cannot copy."""
    _, lists, listed = page_ids.shape
    whole_lanes("bounds", bounds.shape[-1])
    whole_pages("bounds", kv_heads)
    require(
        bounds.dtype in (jnp.bfloat16, jnp.float32), f"bounds must be bfloat16 or float32; got {bounds.dtype.name}"
    )
    require(lists == 1, "bounds of one KV head are no whole tile: lists must be shared by the KV heads")
    require(listed <= LISTED, f"lists of at most {LISTED} pages fit scalar memory; got {listed}")


def _kernel(counts, ids, q_ref, bounds, out_ref, buffer, sem, *, groups: int):
    _, block, kv_heads, width = buffer.shape
    count = counts[pl.program_id(0)]
    blocks = lax.div(count + block - 1, block)

    def copies(i, act):
        """Starts or waits for the copies of block i."""
        slot = lax.rem(i, 2)

        @pl.loop(0, jnp.minimum(block, count - i * block))
        def _(j):
            act(pltpu.make_async_copy(bounds.at[ids[0, i * block + j]], buffer.at[slot, j], sem.at[slot]))

    out_ref[...] = jnp.full(out_ref.shape, HIDDEN, jnp.float32)
    rows = kv_heads * groups
    shape = (rows, block * kv_heads)
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    same = lax.div(lax.broadcasted_iota(jnp.int32, shape, 0), groups) == lax.rem(column, kv_heads)
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

    @pl.when(count > 0)
    def _():
        copies(0, lambda copy: copy.start())

    @pl.loop(0, blocks)
    def _(i):
        @pl.when(i + 1 < blocks)
        def _():
            copies(i + 1, lambda copy: copy.start())

        copies(i, lambda copy: copy.wait())
        scores = lax.dot_general(
            q_ref[...],
            buffer[lax.rem(i, 2)].reshape(block * kv_heads, width),
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if scores.shape[0] > rows:
            scores = scores[:rows] + scores[rows:]
        listed = lax.div(column, kv_heads) < count - i * block
        scores = jnp.where(jnp.logical_and(same, listed), scores, HIDDEN)
        out_ref[pl.ds(i, 1)] = jnp.max(scores, axis=0, keepdims=True)
