"""The XLA backend and the reference against the oracle, and what only the XLA backend promises."""

from __future__ import annotations

from .kv_write_conformance import KvWriteConformance
from .paged_decode_attention_conformance import PagedDecodeAttentionConformance
from .paged_prefill_attention_conformance import PagedPrefillAttentionConformance


class TestXlaKvWrite(KvWriteConformance):
    backend = "xla"


class TestXlaPagedDecodeAttention(PagedDecodeAttentionConformance):
    backend = "xla"


class TestXlaPagedPrefillAttention(PagedPrefillAttentionConformance):
    backend = "xla"


class TestReferenceKvWrite(KvWriteConformance):
    backend = "reference"


class TestReferencePagedDecodeAttention(PagedDecodeAttentionConformance):
    backend = "reference"


class TestReferencePagedPrefillAttention(PagedPrefillAttentionConformance):
    backend = "reference"
