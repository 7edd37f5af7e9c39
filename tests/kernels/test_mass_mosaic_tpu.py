"""The Mosaic TPU backends of attention mass and window scores, interpreted, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from . import attention_mass_conformance as mass
from . import window_scores_conformance as window
from .tpu_conformance import TpuLayout, in_tpu_layout, in_whole_lanes, quick

MORE = (
    mass.MassSpec("one query, largest of pages", (300, 0, 20), head_dim=128, group="max", window=40),
    mass.MassSpec("chunks, largest of pages", (70, 20, 3), (20, 3, 0), dtype="bf16", page_size=32, group="max"),
    mass.MassSpec("many blocks of queries", (400, 0, 90), (300, 0, 40), heads=8, dtype="bf16", soft_cap=3.0),
    mass.MassSpec("int4 chunks, largest", (300, 0, 20), (20, 0, 3), codec="int4", page_size=32, group="max"),
    mass.MassSpec("int8 tokens, head lists", (90, 300), codec="int8", per_token=True, head_lists=True, gaps=True),
    mass.MassSpec("long lists", (2500, 0, 3000), (20, 0, 9), heads=2, kv_heads=1, dtype="bf16", per_token=True),
)


class KeysInTpuLayout(TpuLayout):
    """Keys lie beside values, or are padded, as the pools of a TPU are."""

    def run(self, op: Callable[..., Any], q: Any, k_pages: Any, *lists: Any, **options: Any) -> Any:
        if options.get("scales") is None:
            return super(TpuLayout, self).run(op, q, in_tpu_layout(k_pages, k_pages)[0], *lists, **options)
        options["scales"] = in_whole_lanes(options["scales"], np.nan)
        return super(TpuLayout, self).run(op, q, in_whole_lanes(k_pages, 0), *lists, **options)


class TestMosaicTpuAttentionMass(KeysInTpuLayout, mass.AttentionMassConformance):
    @pytest.mark.parametrize(
        "spec",
        quick(
            (*mass.SPECS, *MORE),
            *("tokens", "head lists with gaps", "chunks", "chunks of tokens", "int8 chunks"),
            *("int4 tokens", "int4 chunks, largest", "many blocks of queries"),
            *("one query, largest of pages", "chunks, largest of pages"),
        ),
    )
    def test_agrees_with_the_oracle(self, spec: mass.MassSpec):
        super().test_agrees_with_the_oracle(spec)


class TestMosaicTpuWindowScores(KeysInTpuLayout, window.WindowScoresConformance):
    @pytest.mark.parametrize("spec", quick(window.SPECS, "rows shorter than the window", "options"))
    def test_agrees_with_the_oracle(self, spec: window.WindowSpec):
        super().test_agrees_with_the_oracle(spec)
