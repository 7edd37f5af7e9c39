"""The Mosaic TPU backends of the ops beside dense attention, interpreted, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pallas_kernels import layouts

from . import page_scores_conformance as scores
from . import quantized_decode_attention_conformance as quantized
from . import quantized_prefill_attention_conformance as prefill
from .coded import CodedSpec
from .tpu_conformance import TpuLayout, in_whole_lanes, quick


class CodesInTpuLayout(TpuLayout):
    """Codes and scales come in whole lanes: codes padded with zeros, scales with NaN, which nobody may read."""

    def run(self, op: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        q, k_codes, v_codes, scales, *lists = arrays
        stored = (None if pool is None else in_whole_lanes(pool, 0) for pool in (k_codes, v_codes))
        pools = (*stored, in_whole_lanes(scales, np.nan))
        return super(TpuLayout, self).run(op, q, *pools, *lists, **options)

    def supports(self, spec: CodedSpec) -> bool:
        return super().supports(spec) and spec.kv_heads != 3


class TestMosaicTpuQuantizedDecodeAttention(CodesInTpuLayout, quantized.QuantizedDecodeAttentionConformance):
    @pytest.mark.parametrize("spec", quick(quantized.SPECS, "int8", "fp8", "everything"))
    def test_agrees_with_the_oracle(self, spec: CodedSpec):
        super().test_agrees_with_the_oracle(spec)


class TestMosaicTpuQuantizedPrefillAttention(CodesInTpuLayout, prefill.QuantizedPrefillAttentionConformance):
    @pytest.mark.parametrize("spec", quick(prefill.SPECS, "nothing before", "int8", "fp8", "everything"))
    def test_agrees_with_the_oracle(self, spec: CodedSpec):
        super().test_agrees_with_the_oracle(spec)


class TestMosaicTpuPageScores(TpuLayout, scores.PageScoresConformance):
    @pytest.mark.parametrize("spec", quick(scores.SPECS, "empty rows", "mha", "mha sum", "head lists"))
    def test_agrees_with_the_oracle(self, spec: scores.ScoreSpec):
        super().test_agrees_with_the_oracle(spec)

    def run(self, op: Callable[..., Any], q: Any, bounds: np.ndarray, *lists: Any, **options: Any) -> Any:
        """Calls `op` on bounds whose halves are padded to whole lanes with zeros."""
        spare = -bounds.shape[-1] % layouts.LANES // 2
        halves = [np.pad(half, ((0, 0), (0, 0), (0, spare))) for half in np.split(bounds, 2, axis=-1)]
        return super(TpuLayout, self).run(op, q, np.concatenate(halves, axis=-1), *lists, **options)

    def supports(self, spec: scores.ScoreSpec) -> bool:
        return super().supports(spec) and spec.kv_heads != 3 and not spec.head_lists
