"""`quantized_decode_attention` as dense attention over decoded pools."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from pallas_kernels import codes
from pallas_kernels.paged_decode_attention.reference import paged_decode_attention


def quantized_decode_attention(
    q: Array, k_codes: Array, v_codes: Array | None, scales: Array, *lists: Array, **options: Any
) -> Array | tuple[Array, Array]:
    """See `pallas_kernels.quantized_decode_attention`."""
    pools = codes.decode_pages(k_codes, v_codes, scales, q.shape[2])
    return paged_decode_attention(q, *pools, *lists, **options)
