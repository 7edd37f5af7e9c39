"""The Mosaic GPU backend of decode attention, in its simulator."""

from __future__ import annotations

import pytest

from pallas_kernels.mosaic_gpu import target

from .cases import Spec
from .paged_decode_attention_conformance import PagedDecodeAttentionConformance

MORE = (
    Spec("odd head dims", (37, 20), head_dim=96, dtype="bf16"),
    Spec("head dim 80", (33,), head_dim=80, window=20, dtype="bf16"),
    Spec("head dim 192", (18,), heads=2, kv_heads=1, head_dim=192, dtype="bf16", sinks=True),
    Spec("head dim 256", (35,), heads=1, kv_heads=1, head_dim=256, page_size=32, dtype="bf16", soft_cap=3.0),
    Spec("more than sixteen queries", (30,), heads=20, kv_heads=1, dtype="bf16"),
    Spec("page 128", (140, 0), heads=2, kv_heads=1, page_size=128, dtype="bf16"),
    Spec("head lists", (60, 33), head_lists=True, gaps=True, dtype="bf16"),
)


class TestMosaicGpuPagedDecodeAttention(PagedDecodeAttentionConformance):
    backend = "mosaic_gpu"
    supports_dtypes = ("bf16",)

    def interpreted(self):
        return target.simulated()

    @pytest.mark.parametrize("spec", MORE, ids=str)
    def test_serves(self, spec: Spec):
        self.agrees(spec)
