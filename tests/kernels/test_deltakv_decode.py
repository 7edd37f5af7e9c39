"""Attention over DeltaKV latents in plain jnp and XLA."""

from __future__ import annotations

from .deltakv_decode_conformance import DeltakvDecodeConformance


class TestReferenceDeltakvDecode(DeltakvDecodeConformance):
    backend = "reference"


class TestXlaDeltakvDecode(DeltakvDecodeConformance):
    backend = "xla"
