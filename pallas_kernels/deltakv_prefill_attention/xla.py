"""`deltakv_prefill_attention` in XLA: each row's pages are opened into a scratch pool, which its chunk then reads as
dense attention does."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.deltakv import Grid, Weights, halves
from pallas_kernels.deltakv_pools import DeltaPools, read_pages
from pallas_kernels.groups import HIDDEN
from pallas_kernels.pages import LARGE, Pages, block_of
from pallas_kernels.ragged import prefill_rows
from pallas_kernels.rotation import rotated


def deltakv_prefill_attention(
    q: Array,
    pools: DeltaPools,
    weights: Weights,
    frequencies: Array,
    tables: Array,
    lengths: Array,
    query_starts: Array,
    *,
    grid: Grid,
    magnitude: float,
    scale: float,
    soft_cap: float | None,
    return_lse: bool,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.deltakv_prefill_attention`."""
    kv_heads, head_dim = pools.centers.shape[2], q.shape[2]
    block = min(block_of(LARGE, grid.page_size), tables.shape[1])
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % block)))
    width = tables.shape[1]
    token = jnp.arange(q.shape[0])

    def one_row(row: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        *scratch, out, lse = carry
        # The last query's own page is not read, and those after it do not exist.
        count = jnp.where(query_starts[row + 1] > query_starts[row], (lengths[row] - 1) // grid.page_size, 0)

        def opened(i: Array, scratch: list[Array]) -> list[Array]:
            place = i * block + jnp.arange(block)
            ids = jnp.where(place < count, lax.dynamic_slice_in_dim(tables[row], i * block, block), 0)
            x = read_pages(pools, weights, ids, tables[row], grid)
            keys, values = halves(x.reshape(-1, *x.shape[2:]), kv_heads)
            position = (place[:, None] * grid.page_size + jnp.arange(grid.page_size)).ravel()
            keys = rotated(keys, position, frequencies, magnitude)
            pages = (
                part.reshape(block, grid.page_size, kv_heads, head_dim).swapaxes(1, 2).astype(q.dtype)
                for part in (keys, values)
            )
            start = (i * block, 0, 0, 0)
            return [lax.dynamic_update_slice(pool, new, start) for pool, new in zip(scratch, pages, strict=True)]

        scratch = lax.fori_loop(0, -(-count // block), opened, scratch)
        listed = jnp.arange(width, dtype=jnp.int32)[None, None]
        options = {"scale": scale, "window": None, "soft_cap": soft_cap}
        pages = Pages.of(*scratch, listed, count[None, None], None, **options)
        starts = lax.dynamic_slice_in_dim(query_starts, row, 2)
        found = prefill_rows(q, pages, lengths[row][None], starts, None, own_page=False)
        mine = (token >= starts[0]) & (token < starts[1])
        out = jnp.where(mine[:, None, None], found[0], out)
        return *scratch, out, jnp.where(mine[:, None], found[1], lse)

    empty = jnp.zeros((width, kv_heads, grid.page_size, head_dim), q.dtype)
    nothing = (empty, empty, jnp.zeros_like(q), jnp.full(q.shape[:2], HIDDEN))
    *_, out, lse = lax.fori_loop(0, lengths.shape[0], one_row, nothing)
    return (out, lse) if return_lse else out
