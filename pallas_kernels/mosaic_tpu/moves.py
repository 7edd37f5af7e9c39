"""Work on whole pages, listed as sources and targets, on TPU: `pallas_kernels.moves.in_blocks` as a kernel.

One program per listed page. Pages come and go by the pipeline of Pallas, the next one while this one is transformed;
the pools that are written are the same arrays as those given.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.interpret import mode
from pallas_kernels.mosaic_tpu.limits import VMEM, require, whole_lanes, whole_pages
from pallas_kernels.moves import Pools, Transform

MOST = 1 << 16  # list entries: both lists lie in scalar memory


def listed(
    transform: Transform,
    into: Pools,
    out_of: Pools,
    page_ids: jax.Array,
    targets: jax.Array,
    count: jax.Array | None,
    name: str,
) -> Pools:
    """`into` with pages `targets` made of pages `page_ids` of `out_of` by `transform`, for the first `count` items.

    Pools are [N, K, ..]; None stays None. Declines pools whose pages cannot be copied as they lie.
    """
    written, read = ([pool for pool in pools if pool is not None] for pools in (into, out_of))
    items = page_ids.shape[0]
    for pool in (*written, *read):
        whole_lanes("pools", pool.shape[-1])
        if pool.ndim == 3:
            whole_pages("pools", pool.shape[1])
    require(items <= MOST, f"at most {MOST} listed pages; got {items}")
    if not items:
        return into
    stop = jnp.int32(items) if count is None else jnp.minimum(count, items)
    # Past the count the lists may hold anything; where nothing counts one program works on page 0 for page 0.
    there = jnp.arange(items) < stop
    page_ids, targets = jnp.where(there, page_ids, 0), jnp.where(there, targets, 0)

    def kernel(_ids, _targets, *refs):
        sources, results = refs[len(written) : len(written) + len(read)], refs[len(written) + len(read) :]
        pages = iter(sources)
        made = transform(*(None if pool is None else next(pages)[...] for pool in out_of))
        for ref, value in zip(results, (new for new in made if new is not None), strict=True):
            ref[...] = value

    def block(pool: jax.Array, which: int) -> pl.BlockSpec:
        rest = (0,) * (pool.ndim - 1)
        return pl.BlockSpec((1, *pool.shape[1:]), lambda i, *lists: (lists[which][i], *rest))

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    made: list[Any] = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(jnp.maximum(stop, 1),),
            in_specs=[in_hbm] * len(written) + [block(pool, 0) for pool in read],
            out_specs=[block(pool, 1) for pool in written],
        ),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in written],
        input_output_aliases={2 + i: i for i in range(len(written))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM),
        interpret=mode(None),
        name=name,
    )(page_ids, targets, *written, *read)
    new = iter(made)
    return tuple(None if pool is None else next(new) for pool in into)
