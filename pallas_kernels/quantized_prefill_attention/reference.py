"""`quantized_prefill_attention` as decode attention of every token on its own, over the pages before its own."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import codes
from pallas_kernels.paged_prefill_attention.reference import owners
from pallas_kernels.quantized_decode_attention.reference import quantized_decode_attention


def quantized_prefill_attention(
    q: Array,
    k_codes: Array,
    v_codes: Array | None,
    scales: Array,
    page_ids: Array,
    counts: Array,
    lengths: Array,
    query_starts: Array,
    *,
    logical_ids: Array | None = None,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.quantized_prefill_attention`."""
    row, visible = owners(q.shape[0], lengths, query_starts)
    own_page = (visible - 1) // codes.page_size(k_codes)
    entry = jnp.arange(page_ids.shape[2])
    logical = entry if logical_ids is None else logical_ids[row]
    before = (entry < counts[row][..., None]) & (logical < own_page[:, None, None])  # [T, Kl, J]
    return quantized_decode_attention(
        q,
        k_codes,
        v_codes,
        scales,
        page_ids[row],
        before.sum(-1),
        visible,
        logical_ids=None if logical_ids is None else logical,
        **options,
    )
