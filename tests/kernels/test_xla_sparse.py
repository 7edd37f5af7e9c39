"""The references and the XLA backends of the ops that score, select, weigh and code pages."""

from __future__ import annotations

from .attention_mass_conformance import AttentionMassConformance
from .page_bounds_conformance import PageBoundsConformance
from .page_codec_conformance import OpenPagesConformance, QuantizePagesConformance
from .page_scores_conformance import PageScoresConformance
from .quantized_decode_attention_conformance import QuantizedDecodeAttentionConformance
from .quantized_prefill_attention_conformance import QuantizedPrefillAttentionConformance
from .select_pages_conformance import SelectPagesConformance
from .window_scores_conformance import WindowScoresConformance


class TestReferencePageBounds(PageBoundsConformance):
    backend = "reference"


class TestReferencePageScores(PageScoresConformance):
    backend = "reference"


class TestReferenceSelectPages(SelectPagesConformance):
    backend = "reference"


class TestReferenceAttentionMass(AttentionMassConformance):
    backend = "reference"


class TestReferenceWindowScores(WindowScoresConformance):
    backend = "reference"


class TestReferenceQuantizedDecodeAttention(QuantizedDecodeAttentionConformance):
    backend = "reference"


class TestReferenceQuantizedPrefillAttention(QuantizedPrefillAttentionConformance):
    backend = "reference"


class TestReferenceQuantizePages(QuantizePagesConformance):
    backend = "reference"


class TestReferenceOpenPages(OpenPagesConformance):
    backend = "reference"


class TestXlaPageBounds(PageBoundsConformance):
    backend = "xla"


class TestXlaPageScores(PageScoresConformance):
    backend = "xla"


class TestXlaSelectPages(SelectPagesConformance):
    backend = "xla"


class TestXlaAttentionMass(AttentionMassConformance):
    backend = "xla"


class TestXlaWindowScores(WindowScoresConformance):
    backend = "xla"


class TestXlaQuantizedDecodeAttention(QuantizedDecodeAttentionConformance):
    backend = "xla"


class TestXlaQuantizedPrefillAttention(QuantizedPrefillAttentionConformance):
    backend = "xla"


class TestXlaQuantizePages(QuantizePagesConformance):
    backend = "xla"


class TestXlaOpenPages(OpenPagesConformance):
    backend = "xla"
