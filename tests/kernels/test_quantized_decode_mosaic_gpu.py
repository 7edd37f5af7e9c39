"""The Mosaic GPU backend of decode attention over coded pages, in its simulator."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic_gpu import target
from pallas_kernels.mosaic_gpu.coded_decode import opened

from .coded import CodedSpec
from .quantized_decode_attention_conformance import QuantizedDecodeAttentionConformance

BF16 = {"dtype": "bf16", "scale_dtype": "bf16"}
MORE = (
    CodedSpec("int8 page 16", (70, 1, 33), codec="int8", head_lists=True, gaps=True, **BF16),
    CodedSpec("int8 page 32", (90, 0), codec="int8", page_size=32, head_dim=128, window=40, **BF16),
    CodedSpec("int8 page 128", (150,), codec="int8", page_size=128, heads=20, kv_heads=1, **BF16),
    CodedSpec("fp8 page 64", (130, 20), codec="fp8", page_size=64, soft_cap=3.0, sinks=True, **BF16),
    CodedSpec("int4 page 32", (70, 33), codec="int4", page_size=32, head_dim=96, window=30, **BF16),
    CodedSpec("int4 page 128", (190, 5), codec="int4", page_size=128, gaps=True, **BF16),
    CodedSpec("int4 head dim 256", (40,), codec="int4", page_size=32, head_dim=256, heads=2, **BF16),
)


QUICK = (MORE[0], MORE[3], MORE[4])


class Simulated(QuantizedDecodeAttentionConformance):
    backend = "mosaic_gpu"
    supports_dtypes = ("bf16",)
    supports_head_dims = (32, 64, 96, 128, 192, 256)

    def interpreted(self):
        return target.simulated()

    def supports(self, spec: CodedSpec) -> bool:
        enough = spec.codec != "int4" or spec.page_size >= 32
        return super().supports(spec) and enough and not spec.side_by_side


@pytest.mark.slow
class TestMosaicGpuQuantizedDecodeAttention(Simulated):
    @pytest.mark.parametrize("spec", MORE, ids=str)
    def test_serves(self, spec: CodedSpec):
        self.agrees(spec)


class TestMosaicGpuCodecs:
    """One case per codec in the quick tests: the simulator takes seconds for each."""

    @pytest.mark.parametrize("spec", QUICK, ids=str)
    def test_serves(self, spec: CodedSpec):
        Simulated().agrees(spec)

    @pytest.mark.parametrize("stored", (jnp.int8, jnp.float8_e4m3fn, jnp.uint8))
    def test_every_code_opens_exactly(self, stored):
        codes = np.arange(256, dtype=np.uint8).view(jnp.dtype(stored))
        for shift in (0, 4) if stored == jnp.uint8 else (None,):
            got = np.asarray(opened(jnp.asarray(codes), shift), np.float32)
            expected = codes.astype(np.float32) if shift is None else ((codes >> shift) & 15).astype(np.float32)
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(got[finite], expected[finite])
            assert np.isfinite(got).all()
