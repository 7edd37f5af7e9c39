"""Array operations over paged KV pools: one folder per op, several implementations each, one dispatch."""

from __future__ import annotations

from pallas_kernels.dispatch import Declined, NoImplementation, explain
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.paged_prefill_attention.api import paged_prefill_attention

__all__ = [
    "Declined",
    "NoImplementation",
    "explain",
    "kv_write",
    "paged_decode_attention",
    "paged_prefill_attention",
]
