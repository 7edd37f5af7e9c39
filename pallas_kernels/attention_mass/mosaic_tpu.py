"""`attention_mass` on TPU."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import codes
from pallas_kernels.mosaic_tpu import coded, work
from pallas_kernels.mosaic_tpu.interpret import Interpret, mode
from pallas_kernels.mosaic_tpu.limits import require
from pallas_kernels.mosaic_tpu.mass import Spec, mass
from pallas_kernels.mosaic_tpu.stream import block_pages, chunked_ids

QUERIES = 128  # of a KV head in a program
NOBODY = 1e30  # the log-sum-exp of queries that are not there: they give nothing


def attention_mass(
    q: Array,
    k_pages: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    lse: Array,
    query_starts: Array | None = None,
    *,
    scales: Array | None = None,
    logical_ids: Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    group: str = "sum",
    per_token: bool = False,
    interpret: Interpret | None = None,
) -> Array:
    """See `pallas_kernels.attention_mass`."""
    batch, (tokens, heads, head_dim) = lengths.shape[0], q.shape
    _, kv_heads, page, lanes = k_pages.shape
    codec, dtype = None, q.dtype
    if scales is None:
        work.check_pool(k_pages, k_pages, head_dim)
        dtype = jnp.promote_types(dtype, k_pages.dtype)
    else:
        work.check_codes(k_pages, k_pages, scales, head_dim)
        page, codec = codes.page_size(k_pages), codes.codec_of(k_pages)
    lists, listed = page_ids.shape[1:]
    each, largest, lone = heads // kv_heads, group == "max", query_starts is None
    require(each <= QUERIES // 8, f"at most {QUERIES // 8} query heads per KV head; got {each}")
    size = 1 if lone else min(QUERIES // each // 8 * 8, -(-tokens // 8) * 8)
    cut = work.lone_queries(lengths) if lone else work.cut(query_starts, lengths, tokens, size)
    rounds = each if largest and not lone else 1
    spec = Spec(
        page=page,
        pages=block_pages(kv_heads if lists == 1 else 1, page, lanes, k_pages.dtype.itemsize, listed, 512),
        heads=kv_heads if lists == 1 else 1,
        per_head=lists > 1,
        logical=logical_ids is not None,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        dtype=jnp.dtype(dtype),
        rounds=rounds,
        rows=-(-size * each // rounds // 8) * 8,
        each=each // rounds,
        largest=largest and lone,
        per_token=per_token,
        codec=codec,
        head_dim=head_dim,
    )

    def queries(x: Array, spare: float) -> Array:
        """Of tokens [T, H, ..] those of the programs [I, K, rounds * rows, ..]."""
        at = jnp.arange(size)
        there = cut.first[:, None] + at <= cut.last[:, None]
        x = x[jnp.clip(cut.token[:, None] + at, 0, tokens - 1)]
        x = jnp.where(there[..., None, None], x, spare)
        x = x.reshape(len(cut.row), size, kv_heads, -1, rounds, x.shape[-1]).transpose(0, 2, 4, 1, 3, 5)
        x = x.reshape(*x.shape[:3], -1, x.shape[-1])
        padding = (0, spec.rows - x.shape[3])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), padding, (0, 0)), constant_values=spare)
        return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])

    found = mass(
        jnp.pad(queries(q.astype(dtype), 0), ((0, 0), (0, 0), (0, 0), (0, lanes - head_dim))),
        queries(lse[..., None], NOBODY),
        (k_pages,) if scales is None else (k_pages, scales),
        chunked_ids(page_ids, logical_ids),
        work.programs(cut, page_ids, counts, logical_ids, page, window, by_list=True),
        batch * lists,
        spec,
        interpret=mode(interpret),
    )
    found = found.reshape(batch, kv_heads, -1, spec.lanes)
    if not per_token:
        found = found[..., : spec.pages]
    elif (halves := coded.halves(codec)) > 1:
        found = found.reshape(*found.shape[:3], halves, spec.pages, page // halves).swapaxes(3, 4)
    found = found.reshape(batch, kv_heads, -1, *((page,) if per_token else ()))[:, :, :listed]
    owned = jnp.ones(batch, bool) if lone else query_starts[1:] > query_starts[:-1]
    there = (jnp.arange(listed) < counts[..., None]) & owned[:, None, None]
    found = jnp.where(there[..., None] if per_token else there, found, 0)
    return found / each if group == "mean" else found
