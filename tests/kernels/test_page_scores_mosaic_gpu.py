"""The Mosaic GPU backend of page scores, in its simulator."""

from __future__ import annotations

import pytest

from pallas_kernels.mosaic_gpu import target

from .page_scores_conformance import SPECS, PageScoresConformance, ScoreSpec

MORE = (
    ScoreSpec("eight heads", (150, 0, 40), heads=32, kv_heads=8, dtype="bf16"),
    ScoreSpec("two blocks of heads", (90, 33), heads=64, kv_heads=4, dtype="bf16", group="max"),
    ScoreSpec("sum over groups", (90, 17), heads=16, kv_heads=8, head_dim=80, dtype="bf16", group="sum"),
    ScoreSpec("several parts", (2400, 300), heads=2, kv_heads=1, dtype="bf16"),
)


class TestMosaicGpuPageScores(PageScoresConformance):
    backend = "mosaic_gpu"
    supports_dtypes = ("bf16",)

    def interpreted(self):
        return target.simulated()

    @pytest.mark.parametrize("spec", (*SPECS, *MORE), ids=str)
    def test_agrees_with_the_oracle(self, spec: ScoreSpec):
        super().test_agrees_with_the_oracle(spec)
