"""`paged_prefill_attention` on TPU: the chunk is cut into blocks of query tokens of one row, each read its
own pages.

The ragged chunk is gathered into blocks and the result gathered back by XLA: one pass over q and one over the
output, which also bring the rows of a KV head together, so the kernel needs no ragged copies.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.mosaic_tpu import work
from pallas_kernels.mosaic_tpu.interpret import Interpret

QUERY_ROWS = 256  # query rows of a KV head in a block: tokens * G


def paged_prefill_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array | None,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    query_starts: Array,
    *,
    logical_ids: Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    interpret: Interpret | None = None,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.paged_prefill_attention`. `v_pages` None: `k_pages` holds K in [..., :D] and V in
    [..., D:2D]."""
    T, H, D = q.shape
    B = lengths.shape[0]
    work.check_pool(k_pages, v_pages, D)
    if T == 0 or B == 0:
        return (q, jnp.zeros((T, H), jnp.float32)) if return_lse else q
    tokens = min(max(8, QUERY_ROWS * k_pages.shape[1] // H), -(-T // 8) * 8)
    cut = work.cut(query_starts, lengths, T, tokens)
    out, lse = work.attend(
        q[jnp.clip(cut.token[:, None] + jnp.arange(tokens), 0, T - 1)],
        (k_pages,) if v_pages is None else (k_pages, v_pages),
        page_ids,
        counts,
        logical_ids,
        cut,
        scale=D**-0.5 if scale is None else scale,
        window=window,
        soft_cap=soft_cap,
        lse=return_lse or sinks is not None,
        out_dtype=q.dtype if sinks is None else jnp.float32,
        interpret=interpret,
    )
    index, wanted = jnp.arange(T), work.wanted_blocks(query_starts, tokens)
    owner = jnp.minimum(jnp.searchsorted(query_starts[1:], index, side="right", method="compare_all"), B - 1)
    within = index - query_starts[owner]
    place = (jnp.cumsum(wanted) - wanted)[owner] + within // tokens, within % tokens
    live = index < query_starts[-1]
    out = jnp.where(live[:, None, None], out[place], 0)
    if lse is not None:
        lse = jnp.where(live[:, None], lse[place], work.NEG)
    if sinks is not None:
        out, lse = work.with_sinks(out, lse, sinks)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out
