"""Attention of ragged chunks on TPU: each is cut into blocks of query tokens of one row, each read its own pages.

The chunk is gathered into blocks and the result gathered back by XLA: one pass over q and one over the output, which
also bring the rows of a KV head together, so the kernel needs no ragged copies.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu import work

QUERY_ROWS = 256  # query rows of a KV head in a block: tokens * G


def prefill(
    q: jax.Array,
    pools: tuple[jax.Array, ...],
    page_ids: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    query_starts: jax.Array,
    *,
    logical_ids: jax.Array | None,
    sinks: jax.Array | None,
    return_lse: bool,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Results of the prefill ops for q [T, H, D]: `pools` and the other options are those of `work.attend`."""
    T, H, _ = q.shape
    B = lengths.shape[0]
    if T == 0 or B == 0:
        return (q, jnp.zeros((T, H), jnp.float32)) if return_lse else q
    tokens = min(max(8, QUERY_ROWS * pools[0].shape[1] // H), -(-T // 8) * 8)
    cut = work.cut(query_starts, lengths, T, tokens)
    out, lse = work.attend(
        q[jnp.clip(cut.token[:, None] + jnp.arange(tokens), 0, T - 1)],
        pools,
        page_ids,
        counts,
        logical_ids,
        cut,
        lse=return_lse or sinks is not None,
        out_dtype=q.dtype if sinks is None else jnp.float32,
        **options,
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
