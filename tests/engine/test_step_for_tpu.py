"""The engine's decode step, compiled for one TPU with the kernels: its pools are updated where they lie."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import pytest
from suite.decode_step import LLAMA_8B, Setup

from pallas_kernels.aot import tpu
from sparsejax.engine.step import StepKey
from tests.engine.in_place import assert_compiled_in_place

LAYERS = 4
NARROW = dataclasses.replace(LLAMA_8B, num_heads=32, num_kv_heads=8, head_dim=64, hidden_size=2048)


@pytest.mark.aot
@pytest.mark.parametrize("steps", (1, 4))
@pytest.mark.parametrize("config", (LLAMA_8B, NARROW), ids=("D128", "D64 side by side"))
def test_pools_are_updated_in_place(config, steps: int):
    assert tpu.available() is None, tpu.available()
    config = dataclasses.replace(config, num_layers=LAYERS, windows=())
    setup = Setup(config, rows=32, context=4096, implementation=("mosaic_tpu", "xla"), platform="tpu")
    program, arguments = setup.shapes(StepKey(chunk=0, rows=setup.rows, num_steps=steps))
    report = tpu.compile(program, arguments, donate=(0,))
    assert len(report.kernels) == LAYERS
    pools = jax.tree.leaves(arguments[0].kv)
    assert sum(pool.size * pool.dtype.itemsize for pool in pools) == setup.pool_bytes
    assert_compiled_in_place(report, arguments[0])


@pytest.mark.aot
def test_pools_of_latents_are_updated_in_place():
    """Filter layers hold int4 pages, the others latents. Open pages, a few of each layer, are apart: sealing latents
    takes tokens first, heads second, and the compiler lays out the open pages that way in fast memory."""
    assert tpu.available() is None, tpu.available()
    config = dataclasses.replace(LLAMA_8B, num_layers=LAYERS, windows=())
    kernels = {"implementation": ("mosaic_tpu", "xla"), "platform": "tpu"}
    setup = Setup(config, rows=32, context=4096, sparsity="deltakv", filters=(0, 1), **kernels)
    program, arguments = setup.shapes(StepKey(chunk=0, rows=setup.rows))
    report = tpu.compile(program, arguments, donate=(0,))
    found = Counter(kernel.name for kernel in report.kernels)
    assert found["deltakv_decode_attention"] == LAYERS - 2, found
    open_pages = setup.group.layouts[-1].open
    assert open_pages.pool_bytes < setup.pool_bytes / 100
    assert_compiled_in_place(report, arguments[0], share=3, besides=[open_pages.shape])
