"""Attention over DeltaKV latents on Hopper, in the simulator, against keys and values read in plain jnp."""

from __future__ import annotations

import dataclasses

import pytest

from pallas_kernels.deltakv import Grid
from pallas_kernels.mosaic_gpu import target

from .deltakv_cases import Sizes
from .deltakv_decode_conformance import SOFT, DeltakvDecodeConformance, Latents

WIDE = Sizes(kv_heads=2, group=2, head_dim=128, latent=128, platform="gpu")
SERVED = (
    Latents("usual", Grid(), 1, WIDE, "bf16"),
    Latents("four neighbours, two groups", Grid(stride=8, neighbours=4), 2, WIDE, "bf16"),
    Latents("wide group, wide latent", Grid(), 1, dataclasses.replace(WIDE, kv_heads=1, group=9, latent=256), "bf16"),
    Latents("page 64, odd number of others", Grid(64, 64, references=3), 1, WIDE, "bf16"),
)


class TestMosaicGpuDeltakvDecode(DeltakvDecodeConformance):
    backend = "mosaic_gpu"

    def interpreted(self):
        return target.simulated()

    def serves(self, spec: Latents) -> bool:
        return spec in SERVED

    @pytest.mark.parametrize("spec", SERVED[:1], ids=str)
    def test_kernel_agrees(self, spec: Latents):
        self.compare(spec, SOFT, logical=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("spec", SERVED[1:], ids=str)
    def test_kernel_agrees_elsewhere(self, spec: Latents):
        self.compare(spec, {}, logical=True)

    @pytest.mark.slow
    @pytest.mark.parametrize("spec", SERVED[:1], ids=str)
    def test_all_pages_of_a_row_need_no_logical_ids(self, spec: Latents):
        self.compare(spec, {}, logical=False)
