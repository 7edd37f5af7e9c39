"""`attention_mass` on Hopper and newer GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import codes
from pallas_kernels.mosaic_gpu import coded_decode, work
from pallas_kernels.mosaic_gpu.mass import Shape, mass
from pallas_kernels.mosaic_gpu.target import require, require_pages, require_plain, require_shared, require_tma
from pallas_kernels.mosaic_gpu.tiles import LOG2E

ROWS = 64  # queries of a tile


def attention_mass(
    q: jax.Array,
    k_pages: jax.Array,
    page_ids: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    lse: jax.Array,
    query_starts: jax.Array | None = None,
    *,
    scales: jax.Array | None = None,
    logical_ids: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    group: str = "sum",
    per_token: bool = False,
) -> jax.Array:
    """See `pallas_kernels.attention_mass`."""
    batch, (tokens, heads, head_dim) = lengths.shape[0], q.shape
    kv_heads, page, coded = k_pages.shape[1], k_pages.shape[2], None
    require_plain(k_pages, k_pages, head_dim)
    if scales is None:
        require_pages(q, k_pages)
    else:
        page, codec = codes.page_size(k_pages), codes.codec_of(k_pages)
        require(q.dtype == jnp.bfloat16, f"queries must be bfloat16 (codes are multiplied as such); got {q.dtype}")
        coded = coded_decode.Shape(batch, kv_heads, 1, *page_ids.shape[1:], page, head_dim, codec, scales.shape[2])
        coded.check_pages(scales.dtype)
    require_tma()
    each, largest, lone = heads // kv_heads, group == "max", query_starts is None
    rounds = each if largest and not lone else 1
    size = 1 if lone else 16 if largest else max(1, ROWS // each)
    shape = Shape(
        kv_heads,
        *page_ids.shape[1:],
        page,
        head_dim,
        rounds=rounds,
        queries=size * each // rounds,
        largest=largest and lone,
        per_page=largest and not per_token,
        one_tile=lone,
        coded=coded,
    )
    require_shared(shape.shared_bytes)

    starts = jnp.arange(batch + 1, dtype=jnp.int32) if lone else query_starts
    owned = starts[1:] - starts[:-1]
    tile = work.lone_tiles(batch) if lone else work.query_tiles(starts, owned, tokens, size)
    lists = (counts, logical_ids, window, page)
    first, stop = work.tile_ranges(tile, starts, lengths, *lists)
    lowest, highest = work.visible_range(lengths, *lists, owned)
    highest = jnp.where(owned[:, None] > 0, highest, 0)
    found = mass(
        work.to_tiles(q, tile, kv_heads, shape.rows, rounds),
        work.to_tiles(lse[..., None] * LOG2E, tile, kv_heads, shape.rows, rounds)[..., 0],
        work.per_query(first, tile, each // rounds, shape.rows),
        work.per_query(stop, tile, each // rounds, shape.rows),
        tile.tile_of,
        -(-owned // size),
        k_pages,
        page_ids,
        lowest // shape.tile * shape.tile,
        highest,
        scales,
        shape=shape,
        scale=scale,
        soft_cap=soft_cap,
    )
    if shape.per_page:
        entry = jnp.arange(shape.width)
        found = found.max(-1) if lone else found.sum(-1)
        return jnp.where(_within(entry * page, lowest // page * page, highest), found, 0)
    found = jnp.where(_within(jnp.arange(shape.width * page), lowest, highest), found, 0)
    found = found / each if group == "mean" else found
    found = found.reshape(batch, kv_heads, shape.width, page)
    return found if per_token else found.sum(-1)


def _within(slot: jax.Array, lowest: jax.Array, highest: jax.Array) -> jax.Array:
    """Which slots [.., S] lie in [lowest, highest) [B, Kl]: [B, Kl, S]."""
    return (slot >= lowest[..., None]) & (slot < highest[..., None])
