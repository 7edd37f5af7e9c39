"""The Mosaic TPU backends of the ops beside dense attention, interpreted, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pallas_kernels import layouts

from . import quantized_decode_attention_conformance as quantized
from .coded import CodedSpec
from .tpu_conformance import TpuLayout, quick


class TestMosaicTpuQuantizedDecodeAttention(TpuLayout, quantized.QuantizedDecodeAttentionConformance):
    @pytest.mark.parametrize("spec", quick(quantized.SPECS, "int8", "fp8", "everything"))
    def test_agrees_with_the_oracle(self, spec: CodedSpec):
        super().test_agrees_with_the_oracle(spec)

    def run(self, op: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Calls `op` on whole lanes: codes padded with zeros, scales with NaN, which nobody may read."""
        q, k_codes, v_codes, scales, *lists = arrays
        pools = (_padded(k_codes, 0), None if v_codes is None else _padded(v_codes, 0), _padded(scales, np.nan))
        return super(TpuLayout, self).run(op, q, *pools, *lists, **options)


def _padded(pool: np.ndarray, value: float) -> np.ndarray:
    spare = -pool.shape[-1] % layouts.LANES
    return np.pad(pool, ((0, 0),) * (pool.ndim - 1) + ((0, spare),), constant_values=value)
