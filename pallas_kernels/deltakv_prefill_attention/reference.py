"""`deltakv_prefill_attention` as decode attention of every token on its own, over the pages before its own."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from pallas_kernels.deltakv import Grid, Weights
from pallas_kernels.deltakv_decode_attention.reference import deltakv_decode_attention
from pallas_kernels.deltakv_pools import DeltaPools
from pallas_kernels.paged_prefill_attention.reference import owners


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
    **options: Any,
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.deltakv_prefill_attention`."""
    row, visible = owners(q.shape[0], lengths, query_starts)
    own = tables[row]
    before = (visible - 1) // grid.page_size
    lists = (own[:, None], before[:, None], visible, own)
    return deltakv_decode_attention(q, pools, weights, frequencies, *lists, grid=grid, **options)
