"""The Mosaic GPU backends of attention mass and window scores, in their simulator."""

from __future__ import annotations

import pytest

from pallas_kernels.mosaic_gpu import target

from . import attention_mass_conformance as mass
from . import window_scores_conformance as window

BF16 = {"dtype": "bf16", "scale_dtype": "bf16"}
QUICK = (
    mass.MassSpec("one query", (150, 0, 40), dtype="bf16", head_lists=True, gaps=True),
    mass.MassSpec("one query, largest of pages", (70, 20), dtype="bf16", group="max", window=40),
    mass.MassSpec("chunks, soft cap", (90, 31, 0), (40, 1, 0), dtype="bf16", soft_cap=3.0, spare_tokens=2),
    mass.MassSpec("chunks, largest of pages", (70, 20), (20, 3), dtype="bf16", page_size=32, group="max"),
    mass.MassSpec("window from within a step to the end", (64, 30), dtype="bf16", window=40, per_token=True),
)
CODED = (
    mass.MassSpec("int4, head lists", (150, 0, 90), codec="int4", page_size=32, head_lists=True, gaps=True, **BF16),
    mass.MassSpec("int8 chunks, tokens", (70, 31), (20, 1), codec="int8", per_token=True, window=30, **BF16),
    mass.MassSpec("int4 chunks, largest of pages", (90, 20), (20, 3), codec="int4", page_size=32, group="max", **BF16),
    mass.MassSpec("fp8, largest of tokens", (90,), codec="fp8", group="max", per_token=True, soft_cap=3.0, **BF16),
)
MORE = (
    mass.MassSpec("int4 page 128", (300, 20), (20, 3), codec="int4", page_size=128, group="max", **BF16),
    mass.MassSpec("int8 page 64, head dim 256", (90,), codec="int8", page_size=64, head_dim=256, heads=2, **BF16),
    mass.MassSpec("chunks, mean, window", (130, 64), (70, 5), dtype="bf16", group="mean", window=24, per_token=True),
    mass.MassSpec("page 128", (300,), page_size=128, dtype="bf16", heads=6, head_dim=80, group="max"),
    mass.MassSpec("head dim 256", (90,), (20,), dtype="bf16", head_dim=256, heads=2, kv_heads=1, group="max"),
)


class OnTheSimulator:
    """Mix in before a conformance class."""

    backend = "mosaic_gpu"
    supports_dtypes = ("bf16",)
    def interpreted(self):
        return target.simulated()


class TestMosaicGpuAttentionMass(OnTheSimulator, mass.AttentionMassConformance):
    def supports(self, spec: mass.MassSpec) -> bool:
        enough = spec.codec != "int4" or spec.page_size >= 32
        return super().supports(spec) and enough and not spec.side_by_side

    @pytest.mark.parametrize(
        "spec",
        [*(pytest.param(spec, id=str(spec)) for spec in (*QUICK, *CODED, *mass.SPECS))]
        + [pytest.param(spec, id=str(spec), marks=pytest.mark.slow) for spec in MORE],
    )
    def test_agrees_with_the_oracle(self, spec: mass.MassSpec):
        super().test_agrees_with_the_oracle(spec)


class TestMosaicGpuWindowScores(OnTheSimulator, window.WindowScoresConformance):
    @pytest.mark.slow
    def test_rows_do_not_depend_on_their_neighbours(self):
        super().test_rows_do_not_depend_on_their_neighbours()
