"""Array operations over paged KV pools: one folder per op, several implementations each, one dispatch."""

from __future__ import annotations

from pallas_kernels.attention_mass.api import attention_mass
from pallas_kernels.deltakv_decode_attention.api import deltakv_decode_attention
from pallas_kernels.deltakv_encode.api import deltakv_encode
from pallas_kernels.deltakv_prefill_attention.api import deltakv_prefill_attention
from pallas_kernels.dispatch import Declined, NoImplementation, explain
from pallas_kernels.kv_write.api import kv_write
from pallas_kernels.open_pages.api import open_pages
from pallas_kernels.page_bounds.api import page_bounds
from pallas_kernels.page_scores.api import page_scores
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.paged_prefill_attention.api import paged_prefill_attention
from pallas_kernels.partials import merge_partials
from pallas_kernels.quantize_pages.api import quantize_pages
from pallas_kernels.quantized_decode_attention.api import quantized_decode_attention
from pallas_kernels.quantized_prefill_attention.api import quantized_prefill_attention
from pallas_kernels.reporting import Served, report
from pallas_kernels.select_pages.api import Selection, select_pages
from pallas_kernels.window_scores.api import window_scores

__all__ = [
    "Declined",
    "NoImplementation",
    "Selection",
    "Served",
    "attention_mass",
    "deltakv_decode_attention",
    "deltakv_encode",
    "deltakv_prefill_attention",
    "explain",
    "kv_write",
    "merge_partials",
    "open_pages",
    "page_bounds",
    "page_scores",
    "paged_decode_attention",
    "paged_prefill_attention",
    "quantize_pages",
    "quantized_decode_attention",
    "quantized_prefill_attention",
    "report",
    "select_pages",
    "window_scores",
]
