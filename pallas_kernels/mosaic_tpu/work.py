"""What the Mosaic TPU attention ops share around the kernel: layout checks, query blocks, page ranges,
sinks."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.codes import page_size
from pallas_kernels.mosaic_tpu import coded
from pallas_kernels.mosaic_tpu.attention import NEG, TILE, Spec, attend_lists
from pallas_kernels.mosaic_tpu.interpret import Interpret, mode
from pallas_kernels.mosaic_tpu.limits import require, whole_lanes, whole_pages
from pallas_kernels.mosaic_tpu.stream import Work, block_pages, chunked_ids

PAGES = (16, 32, 64, 128)


def check_pool(k_pages: jax.Array, v_pages: jax.Array | None, head_dim: int) -> None:
    """Declines pools whose physical layout the kernels cannot copy page by page."""
    lanes, page, dtype = k_pages.shape[-1], k_pages.shape[-2], k_pages.dtype
    stored = 2 * head_dim if v_pages is None else head_dim
    hint = ". Store head dims up to 64 as K and V side by side in one pool, others padded with zeros"
    whole_lanes("a TPU pool", lanes, hint)
    require(stored <= lanes, f"head dim {head_dim} does not fit the pool's minor dimension {lanes}")
    require(page in PAGES, f"page size must be one of {PAGES}; got {page}")
    require(dtype in (jnp.bfloat16, jnp.float32), f"pool dtype must be bfloat16 or float32; got {dtype.name}")


def check_codes(k_codes: jax.Array, v_codes: jax.Array | None, scales: jax.Array, head_dim: int) -> None:
    """Declines coded pools whose physical layout the kernel cannot copy page by page."""
    lanes, page = k_codes.shape[-1], page_size(k_codes)
    stored = 2 * head_dim if v_codes is None else head_dim
    whole_lanes("codes", lanes)
    whole_lanes("scales", scales.shape[-1])
    whole_pages("scales", scales.shape[1])
    require(stored <= lanes, f"head dim {head_dim} does not fit the minor dimension {lanes} of the codes")
    require(page in PAGES, f"page size must be one of {PAGES}; got {page}")


def page_range(logical_ids, counts, first, last, page: int, window: int | None, own_page: bool = True):
    """Entries [start, stop) of lists [I, Kl, J] that queries at positions first..last [I] may see; both [I,
    Kl]."""
    needed = last[:, None] // page + own_page  # logical pages 0 .. needed - 1
    oldest = jnp.zeros_like(needed) if window is None else jnp.maximum(first[:, None] - window + 1, 0) // page
    if logical_ids is None:
        return jnp.minimum(oldest, counts), jnp.minimum(needed, counts)
    listed = jnp.arange(logical_ids.shape[-1]) < counts[..., None]
    before = lambda bound: jnp.sum(listed & (logical_ids < bound[..., None]), axis=-1, dtype=jnp.int32)  # noqa: E731
    return before(oldest), before(needed)


@dataclass(frozen=True)
class Cut:
    """Blocks of query tokens of one row each: that row [I], its first token among the flat ones, and the positions of
    the first and the last one. A block without tokens has last < first."""

    row: jax.Array
    token: jax.Array
    first: jax.Array
    last: jax.Array


def lone_queries(lengths: jax.Array) -> Cut:
    """A block for each row that owns its newest token."""
    index = jnp.arange(lengths.shape[0])
    return Cut(index, index, lengths - 1, lengths - 1)


def wanted_blocks(query_starts: jax.Array, size: int) -> jax.Array:
    """Blocks of `size` tokens that each row needs."""
    return (query_starts[1:] - query_starts[:-1] + size - 1) // size


def cut(query_starts: jax.Array, lengths: jax.Array, tokens: int, size: int) -> Cut:
    """The chunks of all rows, `tokens` together, in blocks of `size` tokens."""
    rows = lengths.shape[0]
    wanted = wanted_blocks(query_starts, size)
    upto = jnp.cumsum(wanted)
    block = jnp.arange(tokens // size + rows)  # enough for any cut
    row = jnp.searchsorted(upto, block, side="right", method="compare_all")
    row = jnp.minimum(row, rows - 1).astype(jnp.int32)
    token = query_starts[row] + (block - (upto - wanted)[row]) * size
    first = lengths[row] - (query_starts[row + 1] - token)
    there = block < upto[-1]
    last = jnp.where(there, jnp.minimum(first + size, lengths[row]) - 1, -1)
    return Cut(row, token, jnp.where(there, first, 0), last)


def programs(
    cut: Cut,
    page_ids: jax.Array,
    counts: jax.Array,
    logical_ids: jax.Array | None,
    page: int,
    window: int | None,
    by_list: bool = False,
    own_page: bool = True,
) -> Work:
    """Each block with each list of its row: by block, then list, or the other way around."""
    logical_ids = None if logical_ids is None else logical_ids[cut.row]
    start, stop = page_range(logical_ids, counts[cut.row], cut.first, cut.last, page, window, own_page)
    lists = page_ids.shape[1]

    def flat(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (cut.row.shape[0], lists)).astype(jnp.int32)
        return (x.T if by_list else x).reshape(-1)

    return Work(
        row=flat(cut.row[:, None] * lists + jnp.arange(lists)),
        start=flat(start),
        stop=flat(jnp.where((cut.last >= cut.first)[:, None], stop, 0)),
        first=flat(cut.first[:, None]),
        last=flat(cut.last[:, None]),
    )


def attend(
    q: jax.Array,
    pools: tuple[jax.Array, ...],
    page_ids: jax.Array,
    counts: jax.Array,
    logical_ids: jax.Array | None,
    cut: Cut,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    lse: bool,
    out_dtype: jnp.dtype,
    codec: str | None = None,
    own_page: bool = True,
    interpret: Interpret | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Blocks of query tokens against the pages of their sequences.

    q [I, M, H, D] are the tokens of the blocks of `cut`.
    Returns out [I, M, H, D] of out_dtype and lse [I, M, H] float32.
    """
    items, tokens, H, D = q.shape
    _, K, page, lanes = pools[0].shape
    page *= coded.halves(codec)
    G, rows = H // K, tokens * (H // K)
    padded = -(-rows // 8) * 8 if rows <= TILE else -(-rows // TILE) * TILE
    dtype = jnp.promote_types(q.dtype, pools[0].dtype) if codec is None else q.dtype
    blocks = q.reshape(items, tokens, K, G, D).swapaxes(1, 2).reshape(items, K, rows, D)
    blocks = jnp.pad(blocks.astype(dtype), ((0, 0), (0, 0), (0, padded - rows), (0, lanes - D)))
    per_head, J = page_ids.shape[1] > 1, page_ids.shape[2]
    heads = 1 if per_head else K
    spec = Spec(
        page=page,
        pages=block_pages(heads, page, lanes, pools[0].dtype.itemsize, J, 1024 if tokens == 1 else 512),
        heads=heads,
        per_head=per_head,
        logical=logical_ids is not None,
        group=G,
        tokens=tokens,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        joint=len(pools) == (1 if codec is None else 2),
        lse=lse,
        dtype=jnp.dtype(dtype),
        head_dim=D,
        codec=codec,
        own_page=own_page,
    )
    out, sums = attend_lists(
        blocks,
        pools,
        chunked_ids(page_ids, logical_ids),
        programs(cut, page_ids, counts, logical_ids, page, window, own_page=own_page),
        spec,
        out_dtype=out_dtype,
        interpret=mode(interpret),
    )
    at = D if spec.joint else 0
    out = (
        out[:, :, :rows, at : at + D]
        .reshape(items, K, tokens, G, D)
        .swapaxes(1, 2)
        .reshape(items, tokens, H, D)
    )
    if sums is not None:
        sums = sums[:, :, :rows].reshape(items, K, tokens, G).swapaxes(1, 2).reshape(items, tokens, H)
    return out, sums


def with_sinks(out, lse, sinks):
    """Adds one logit per head to the denominators of out [.., H, D] with log-sum-exp lse [.., H]."""
    seen = lse > NEG / 2
    share = jnp.where(seen, jax.nn.sigmoid(lse - sinks), 0)
    return out * share[..., None], jnp.where(seen, jnp.logaddexp(lse, sinks), NEG)
