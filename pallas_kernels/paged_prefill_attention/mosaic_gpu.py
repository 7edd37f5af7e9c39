"""`paged_prefill_attention` on Hopper GPUs.

Rows of one token (decode rows of a mixed step) take the decode kernel, which splits their lists over
blocks; the others are cut into query tiles. Both kernels run and follow their rows' counts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import chunks
from pallas_kernels.mosaic_gpu.prefill import Config
from pallas_kernels.mosaic_gpu.target import require_plain
from pallas_kernels.paged_decode_attention.mosaic_gpu import paged_decode_attention


def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_ids: jax.Array,
    counts: jax.Array,
    lengths: jax.Array,
    query_starts: jax.Array,
    *,
    logical_ids: jax.Array | None = None,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.paged_prefill_attention`. `config` overrides the heuristic."""
    tokens, _, head_dim = q.shape
    require_plain(k_pages, v_pages, head_dim)
    pools, lists = (k_pages, v_pages), (page_ids, counts)
    options: dict[str, Any] = {"logical_ids": logical_ids, "scale": scale, "window": window, "soft_cap": soft_cap}
    owned = query_starts[1:] - query_starts[:-1]
    single = owned == 1
    several = jnp.where(single, 0, owned)
    out, lse = chunks.attend(q, *pools, *lists, lengths, query_starts, several, **options, config=config)
    newest = q[jnp.clip(query_starts[:-1], 0, tokens - 1)]
    alone = jnp.where(single, lengths, 0)
    lone, lone_lse = paged_decode_attention(newest, *pools, *lists, alone, **options, return_lse=True)
    row, has_row = chunks.row_of(query_starts, tokens)
    is_lone = single[row][:, None]
    out = jnp.where(is_lone[..., None], lone[row], out)
    lse = jnp.where(is_lone, lone_lse[row], lse)
    return chunks.finished(out, lse, has_row, sinks, q.dtype, return_lse)
