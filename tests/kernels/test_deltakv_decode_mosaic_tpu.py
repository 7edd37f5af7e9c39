"""Attention over DeltaKV latents on TPU, interpreted, against the oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from pallas_kernels.deltakv import Grid
from pallas_kernels.mosaic_tpu import stream
from pallas_kernels.mosaic_tpu.interpret import interpreting

from .deltakv_cases import Sizes
from .deltakv_decode_conformance import SOFT, DeltakvDecodeConformance, Latents
from .tpu_simulator import DMA_MODES, simulate

WIDE = Sizes(kv_heads=4, group=2, head_dim=128, latent=128, platform="tpu")
SERVED = (
    Latents("usual", Grid(), 1, WIDE),
    Latents("bf16, four neighbours, two groups", Grid(stride=8, neighbours=4), 2, WIDE, "bf16"),
    Latents("odd number of others", Grid(stride=32, references=3), 1, WIDE),
    Latents("centers not rounded", Grid(centers="none"), 1, WIDE),
)


class TestMosaicTpuDeltakvDecode(DeltakvDecodeConformance):
    backend = "mosaic_tpu"

    @contextlib.contextmanager
    def interpreted(self) -> Iterator[None]:
        with interpreting():
            yield

    def serves(self, spec: Latents) -> bool:
        return spec in SERVED

    @pytest.mark.parametrize("spec", SERVED, ids=str)
    def test_kernel_agrees_with_the_oracle(self, spec: Latents):
        self.compare(spec, SOFT if spec.dtype == "f32" else {}, logical=True)

    def test_all_pages_of_a_row_need_no_logical_ids(self):
        self.compare(SERVED[0], {}, logical=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", DMA_MODES)
def test_right_and_free_of_races(monkeypatch, mode: str):
    monkeypatch.setattr(stream, "IDS", 8)  # short, so that the lists stream through scalar memory in chunks

    class Simulated(DeltakvDecodeConformance):
        backend = "mosaic_tpu"

        def run(self, op, *arrays, **options):
            result, raced = simulate(mode, op, *arrays, **options)
            assert not raced
            return result

    Simulated().compare(SERVED[0], {}, logical=True)
