"""The Mosaic GPU backends of coded pages beside decode, in their simulator: opening, and chunks over coded history."""

from __future__ import annotations

import types

import jax.numpy as jnp
import pytest

from pallas_kernels.mosaic_gpu import target
from pallas_kernels.quantized_prefill_attention import mosaic_gpu

from . import page_codec_conformance as codec
from . import quantized_prefill_attention_conformance as prefill
from .coded import CodedSpec
from .conformance import Conformance

BF16 = {"dtype": "bf16", "scale_dtype": "bf16"}
MORE = (
    CodedSpec("fp8 page 128, head dim 256", (3,), codec="fp8", page_size=128, head_dim=256, **BF16),
    CodedSpec("int4 page 32", (9,), codec="int4", page_size=32, head_dim=96, **BF16),
    CodedSpec("int4 page 128", (3,), codec="int4", page_size=128, kv_heads=1, **BF16),
    CodedSpec("int8 page 16", (5,), codec="int8", page_size=16, **BF16),
)
CHUNKS = (
    CodedSpec("int8 chunks", (70, 0, 33, 20), (30, 0, 1, 20), codec="int8", spare_tokens=3, **BF16),
    CodedSpec("int4 head lists", (150, 90), (20, 5), codec="int4", page_size=32, head_lists=True, gaps=True, **BF16),
    CodedSpec(
        "fp8, window", (130, 40), (40, 12), codec="fp8", page_size=32, window=50, soft_cap=3.0, sinks=True, **BF16
    ),
)


class Coded(Conformance):
    """Mix in before a conformance class."""

    backend = "mosaic_gpu"
    supports_dtypes = ("bf16",)
    supports_head_dims = (32, 64, 96, 128, 192, 256)

    def interpreted(self):
        return target.simulated()

    def supports(self, spec: CodedSpec) -> bool:
        enough = spec.codec != "int4" or spec.page_size >= 32
        return super().supports(spec) and enough and not spec.side_by_side


def slow_if_served(spec: CodedSpec):
    """What is declined takes no time."""
    return pytest.param(spec, id=str(spec), marks=[pytest.mark.slow] * Coded().supports(spec))


class TestMosaicGpuOpenPages(Coded, codec.OpenPagesConformance):
    @pytest.mark.parametrize(
        ("spec", "count"),
        [pytest.param(MORE[1], 5, id="int4 page 32, 5 listed")]
        + [pytest.param(spec, None, id=str(spec)) for spec in (*MORE, *codec.SPECS)],
    )
    def test_pages_hold_what_the_codes_stand_for(self, spec: CodedSpec, count: int | None):
        super().test_pages_hold_what_the_codes_stand_for(spec, count)


class TestMosaicGpuQuantizedPrefillAttention(Coded, prefill.QuantizedPrefillAttentionConformance):
    @pytest.fixture(autouse=True)
    def dead_scratch(self, monkeypatch):
        """Pages of the scratch that nobody opened hold NaN."""
        nan = types.SimpleNamespace(empty=lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
        monkeypatch.setattr(mosaic_gpu, "lax", nan)

    @pytest.mark.parametrize("spec", (*CHUNKS, *(slow_if_served(spec) for spec in prefill.SPECS)))
    def test_agrees_with_the_oracle(self, spec: CodedSpec):
        super().test_agrees_with_the_oracle(spec)

    @pytest.mark.slow
    def test_cuts_into_chunks_agree(self):
        super().test_cuts_into_chunks_agree()
