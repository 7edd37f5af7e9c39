"""The Mosaic GPU backend of prefill attention, in its simulator."""

from __future__ import annotations

import pytest

from pallas_kernels.mosaic_gpu import target

from .paged_prefill_attention_conformance import PagedPrefillAttentionConformance


class TestMosaicGpuPagedPrefillAttention(PagedPrefillAttentionConformance):
    backend = "mosaic_gpu"
    supports_dtypes = ("bf16",)

    def interpreted(self):
        return target.simulated()

    @pytest.mark.slow
    def test_cuts_into_chunks_agree(self):
        """Nine runs of the simulator."""
        super().test_cuts_into_chunks_agree()
