"""What surrounds the attention kernels in XLA: visible ranges of the page lists, split counts, merging of
the parts."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.mosaic_gpu.tiles import HIDDEN, LOG2E

MULTIPROCESSORS = 132


def tokens_before(
    position: Int32[Array, B * X],
    counts: Int32[Array, "B Kl"],
    logical_ids: Int32[Array, "B Kl J"] | None,
    page: int,
) -> Int32[Array, "B Kl *X"]:
    """How many tokens of each page list lie before a position. Lists ascend, so they are the list's first
    ones."""
    extra = position.ndim - 1
    position = jnp.maximum(position, 0)[:, None]
    counts = counts.reshape(*counts.shape, *(1,) * extra)
    if logical_ids is None:
        return jnp.minimum(position, counts * page)
    starts = logical_ids.reshape(*logical_ids.shape[:2], *(1,) * extra, -1) * page
    listed = jnp.arange(logical_ids.shape[2]) < counts[..., None]
    inside = jnp.clip(position[..., None] - starts, 0, page)
    return jnp.sum(jnp.where(listed, inside, 0), axis=-1, dtype=jnp.int32)


def visible_range(
    lengths: Int32[Array, B],
    counts: Int32[Array, "B Kl"],
    logical_ids: Int32[Array, "B Kl J"] | None,
    window: int | None,
    page: int,
    queries: Int32[Array, B] | int = 1,
) -> tuple[Int32[Array, "B Kl"], Int32[Array, "B Kl"]]:
    """Slots [first, stop) of each page list that some of the row's newest `queries` tokens see.

    Slot = entry * P + offset."""
    stop = tokens_before(lengths, counts, logical_ids, page)
    if window is None:
        return jnp.zeros_like(stop), stop
    return tokens_before(lengths - queries + 1 - window, counts, logical_ids, page), stop


def split_count(blocks: int, slots: int, tile: int) -> int:
    """Into how many parts to cut each list of at most `slots` tokens, of which there are `blocks`.

    Enough for two waves over the multiprocessors with two blocks on each, and at least eight, so that one
    long row among short ones is spread; no part smaller than eight tiles of a full list.
    """
    wanted = max(8, math.ceil(4 * MULTIPROCESSORS / blocks))
    return max(1, min(wanted, math.ceil(slots / (8 * tile)), 64))


def merge(
    out: Float32[Array, "B K S M D"],
    top: Float32[Array, "B K S M"],
    total: Float32[Array, "B K S M"],
    sinks: Float32[Array, "K M"] | None,
) -> tuple[Float32[Array, "B K M D"], Float32[Array, "B K M"]]:
    """Joins the parts of a softmax over split lists; `top` is in powers of two. Returns (out, natural
    log-sum-exp)."""
    seen: Bool[Array, "B K S M"] = total > 0
    highest = jnp.max(jnp.where(seen, top, HIDDEN), axis=2)
    if sinks is not None:
        sinks = sinks * LOG2E
        highest = jnp.maximum(highest, sinks)
    weight = jnp.where(seen, jnp.exp2(top - highest[:, :, None]), 0)
    mass = jnp.sum(jnp.where(seen, total, 0) * weight, axis=2)
    if sinks is not None:
        mass += jnp.exp2(sinks - highest)
    sees = seen.any(axis=2)
    mass = jnp.where(sees, mass, 1)
    # Parts without work leave their output unwritten.
    joined = jnp.sum(jnp.where(seen[..., None], out, 0) * weight[..., None], axis=2)
    joined = jnp.where(sees[..., None], joined / mass[..., None], 0)
    return joined, jnp.where(sees, (highest + jnp.log2(mass)) / LOG2E, HIDDEN)


def finished(
    partial: tuple[jax.Array, jax.Array, jax.Array],
    sinks: jax.Array | None,
    q: jax.Array,
    kv_heads: int,
    return_lse: bool,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """What a decode op returns, of the parts of the kernel and the queries [B, H, D] as given."""
    heads, rows = q.shape[1], partial[1].shape[-1]
    if sinks is not None:
        each = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], (heads, 1))[None]
        sinks = grouped(each, kv_heads, rows)[0][0, :, :, 0]
    out, lse = merge(*partial, sinks)
    out = ungrouped(out, kv_heads, heads).astype(q.dtype)
    return (out, ungrouped(lse, kv_heads, heads)) if return_lse else out


def grouped(q: jax.Array, kv_heads: int, rows: int) -> tuple[jax.Array, int]:
    """Queries [B, H, D] as [B, K * X, M, D]: the G heads of a KV head in X blocks of at most `rows`,
    padded to M rows. Returns them and X."""
    batch, heads, head_dim = q.shape
    group = heads // kv_heads
    parts = math.ceil(group / rows)
    q = q.reshape(batch, kv_heads, group, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, parts * rows - group), (0, 0)))
    return q.reshape(batch, kv_heads * parts, rows, head_dim), parts


def ungrouped(x: jax.Array, kv_heads: int, heads: int) -> jax.Array:
    """Inverse of `grouped` for results [B, K * X, M, ...]: [B, H, ...]."""
    tail = x.shape[3:]
    x = x.reshape(x.shape[0], kv_heads, -1, *tail)[:, :, : heads // kv_heads]
    return x.reshape(x.shape[0], heads, *tail)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """X tiles of consecutive tokens of one row: `row` [X], `token` [X, Y] indices into the flat tokens (in
    range), `counted` [X, Y] whether a token is one of the tile's, `tile_of` [B] first tile of each row."""

    row: Int32[Array, X]
    token: Int32[Array, "X Y"]
    counted: Bool[Array, "X Y"]
    tile_of: Int32[Array, B]
    starts: Int32[Array, B]


def query_tiles(query_starts: Int32[Array, B + 1], owned: Int32[Array, B], tokens: int, size: int) -> QueryTiles:
    """Cuts each row's `owned` tokens into tiles of `size`; tiles that no row needs count no token."""
    rows = owned.shape[0]
    ends = jnp.cumsum(-(-owned // size), dtype=jnp.int32)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    index = jnp.arange(tokens // size + min(rows, tokens), dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right"), rows - 1).astype(jnp.int32)
    offset = (index - first[row])[:, None] * size + jnp.arange(size, dtype=jnp.int32)
    counted = (offset < owned[row][:, None]) & (index < ends[-1])[:, None]
    token = jnp.clip(query_starts[row][:, None] + offset, 0, tokens - 1)
    return QueryTiles(row, token, counted, first, query_starts[:-1])


def lone_tiles(batch: int) -> QueryTiles:
    """A tile for each of the tokens 0, 1, .. of rows that own one each."""
    index = jnp.arange(batch, dtype=jnp.int32)
    return QueryTiles(index, index[:, None], jnp.ones((batch, 1), bool), index, index)


def tile_ranges(
    tile: QueryTiles,
    query_starts: Int32[Array, B + 1],
    lengths: Int32[Array, B],
    counts: Int32[Array, "B Kl"],
    logical_ids: Int32[Array, "B Kl J"] | None,
    window: int | None,
    page: int,
    own_page: bool = True,
) -> tuple[Int32[Array, "X Kl Y"], Int32[Array, "X Kl Y"]]:
    """Slots [first, stop) of its row's lists that each token of a tile sees: up to its own or, without `own_page`,
    in the pages before that of its own."""
    row, counts = tile.row, counts[tile.row]
    position = lengths[row][:, None] - (query_starts[row + 1][:, None] - tile.token)
    logical_ids = None if logical_ids is None else logical_ids[row]
    stop = tokens_before(position + 1 if own_page else position // page * page, counts, logical_ids, page)
    if window is None:
        return jnp.zeros_like(stop), stop
    return tokens_before(position + 1 - window, counts, logical_ids, page), stop


def per_query(x: Int32[Array, "X Kl Y"], tile: QueryTiles, repeats: int, rows: int) -> Int32[Array, "X Kl M"]:
    """Numbers of tokens as those of their `repeats` queries each, 0 for the others of a tile's `rows`."""
    x = jnp.repeat(jnp.where(tile.counted[:, None], x, 0), repeats, axis=-1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[-1])))


def to_tiles(q: jax.Array, tile: QueryTiles, kv_heads: int, rows: int, rounds: int = 1) -> jax.Array:
    """Queries [T, H, D] as [X, K, rounds * M, D]: row y * G + g of a tile is head g of the group of its token y.

    With a round per head of a group, row y of round g is that."""
    count, size = tile.token.shape
    _, heads, head_dim = q.shape
    x = jnp.where(tile.counted[..., None, None], q[tile.token], 0)
    x = x.reshape(count, size, kv_heads, -1, rounds, head_dim).transpose(0, 2, 4, 1, 3, 5)
    x = x.reshape(count, kv_heads, rounds, -1, head_dim)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, rows - x.shape[3]), (0, 0)))
    return x.reshape(count, kv_heads, rounds * rows, head_dim)


def from_tiles(x: jax.Array, tile: QueryTiles, tokens: int, group: int) -> jax.Array:
    """Results [X, K, M, ...] of tiles as [T, H, ...]; a token of no tile takes any tile's."""
    size = tile.token.shape[1]
    index = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.clip(jnp.searchsorted(tile.starts, index, side="right") - 1, 0, tile.starts.shape[0] - 1)
    offset = index - tile.starts[row]
    at = jnp.clip(tile.tile_of[row] + offset // size, 0, x.shape[0] - 1)
    kv_heads, tail = x.shape[1], x.shape[3:]
    x = x[:, :, : size * group].reshape(x.shape[0], kv_heads, size, group, *tail)
    return x[at, :, offset % size].reshape(tokens, kv_heads * group, *tail)
