"""The Mosaic TPU backends, interpreted, against the oracle."""

from __future__ import annotations

from .kv_write_conformance import KvWriteConformance
from .paged_decode_attention_conformance import PagedDecodeAttentionConformance
from .paged_prefill_attention_conformance import PagedPrefillAttentionConformance
from .tpu_conformance import TpuLayout


class TestMosaicTpuPagedDecodeAttention(TpuLayout, PagedDecodeAttentionConformance):
    pass


class TestMosaicTpuPagedPrefillAttention(TpuLayout, PagedPrefillAttentionConformance):
    pass


class TestXlaKvWriteInTpuLayouts(TpuLayout, KvWriteConformance):
    backend = "xla"


class TestXlaDecodeInTpuLayouts(TpuLayout, PagedDecodeAttentionConformance):
    backend = "xla"


class TestReferenceDecodeInTpuLayouts(TpuLayout, PagedDecodeAttentionConformance):
    backend = "reference"
