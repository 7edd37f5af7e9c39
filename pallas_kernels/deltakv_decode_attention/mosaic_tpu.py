"""`deltakv_decode_attention` on TPU."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.deltakv import Grid, Weights
from pallas_kernels.deltakv_decode_attention.named import centers_of_lists
from pallas_kernels.deltakv_pools import DeltaPools
from pallas_kernels.mosaic_tpu import work
from pallas_kernels.mosaic_tpu.interpret import Interpret, mode
from pallas_kernels.mosaic_tpu.latents import NAMED, Spec, attend_latents, block_pages
from pallas_kernels.mosaic_tpu.limits import VMEM, require, whole_lanes
from pallas_kernels.mosaic_tpu.stream import chunked_ids


def deltakv_decode_attention(
    q: Array,
    pools: DeltaPools,
    weights: Weights,
    frequencies: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    tables: Array,
    *,
    grid: Grid,
    logical_ids: Array | None = None,
    magnitude: float,
    scale: float,
    soft_cap: float | None,
    return_lse: bool,
    interpret: Interpret | None = None,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.deltakv_decode_attention`."""
    batch, heads, head_dim = q.shape
    kv_heads, groups, latent = pools.centers.shape[2], pools.latents.shape[1], pools.latents.shape[3]
    g = weights["g"].astype(q.dtype).reshape(kv_heads, 2, head_dim, latent)
    _check(pools, grid, head_dim, g)
    pages = block_pages(grid)
    spec = Spec(
        page=grid.page_size,
        pages=pages,
        heads=kv_heads,
        per_head=False,
        logical=logical_ids is not None,
        scale=scale,
        window=None,
        soft_cap=soft_cap,
        dtype=jnp.dtype(q.dtype),
        codec="int4",
        grid=grid,
        groups=groups,
        lse=return_lse,
    )
    group = heads // kv_heads
    rows = -(-group // 8) * 8
    queries = jnp.pad(q.reshape(batch, kv_heads, group, head_dim), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    found = centers_of_lists(pools, page_ids, counts, tables, grid)
    size = -(-page_ids.shape[2] // pages)
    blocks = lambda x: _blocks(x, pages, size)  # noqa: E731
    taken = blocks(found.taken) + spec.named * jnp.arange(pages)[:, None, None]
    halves = taken.reshape(batch, size, pages, 2, -1, grid.neighbours)
    sides = [halves.transpose(0, 1, 5, 3, 2, 4).reshape(batch, size, grid.neighbours, -1)]
    if found.scales is not None:
        scales = blocks(found.scales).reshape(batch, size, pages * spec.named, 2 * kv_heads).swapaxes(2, 3)
        sides.append(jnp.pad(scales, ((0, 0), (0, 0), (0, 0), (0, NAMED - pages * spec.named))))
    centers = pools.centers.reshape(-1, kv_heads, 2 * head_dim)
    turns = jnp.stack([jnp.tile(frequencies, 2), jnp.full(head_dim, magnitude), _signed(head_dim) * magnitude])
    numbers = jnp.moveaxis(found.pages * grid.own + found.slots, 2, 0)[:, :, None]
    out, lse = attend_latents(
        queries,
        turns.astype(jnp.float32),
        g,
        (pools.latents, pools.latent_scales, centers, *sides),
        chunked_ids(page_ids, logical_ids, *numbers),
        work.programs(work.lone_queries(lengths), page_ids, counts, logical_ids, grid.page_size, None),
        spec,
        interpret=mode(interpret),
    )
    out = out[:, :, :group].reshape(q.shape)
    return (out, lse[:, :, :group].reshape(batch, heads)) if return_lse else out


def _check(pools: DeltaPools, grid: Grid, head_dim: int, g: Array) -> None:
    """Declines what the kernel cannot copy page by page or hold."""
    require(grid.latents == "int4", f"latents must be int4; got {grid.latents}")
    require(grid.page_size in work.PAGES[1:], f"page size must be one of {work.PAGES[1:]}; got {grid.page_size}")
    rows = pools.latents.shape[2]
    require(rows == grid.padded_rows, f"latents of a page must be padded to {grid.padded_rows} rows; got {rows}")
    whole_lanes("latents", pools.latents.shape[3])
    require(head_dim % 128 == 0, f"head dim must be a multiple of 128; got {head_dim}")
    require(block_pages(grid) > 0, f"a page may name {NAMED} centers with its own; got {grid.own + grid.references}")
    kv_heads = pools.centers.shape[2]
    require(kv_heads in (4, 8) or kv_heads % 8 == 0, f"KV heads must be 4 or a multiple of 8; got {kv_heads}")
    require(2 * g.nbytes <= VMEM // 2, f"g must fit VMEM twice beside the rest; got {g.nbytes} bytes")


def _blocks(x: Array, pages: int, count: int) -> Array:
    """[B, J, ..] as [B, blocks, pages, ..]."""
    x = jnp.pad(x, ((0, 0), (0, count * pages - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], count, pages, *x.shape[2:])


def _signed(head_dim: int) -> Array:
    """What multiplies the sine of each dimension: those of the first half go down."""
    return jnp.where(jnp.arange(head_dim) < head_dim // 2, -1.0, 1.0)
