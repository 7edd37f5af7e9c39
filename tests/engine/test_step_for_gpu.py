"""The engine's decode step, compiled for one H200 with the kernels: its pools are updated where they lie."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import pytest
from suite.decode_step import LLAMA_8B, Setup

from pallas_kernels.aot import cuda
from pallas_kernels.aot.report import Report
from sparsejax.engine.step import StepKey
from tests.engine.in_place import assert_compiled_in_place

LAYERS = 4


@pytest.mark.aot
@pytest.mark.parametrize("steps", (1, 4))
def test_pools_are_updated_in_place(steps: int):
    assert cuda.available() is None, cuda.available()
    config = dataclasses.replace(LLAMA_8B, num_layers=LAYERS, windows=())
    setup = Setup(config, rows=32, context=4096, implementation=("mosaic_gpu", "xla"))
    program, arguments = setup.shapes(StepKey(chunk=0, rows=setup.rows, num_steps=steps))
    report = cuda.compile(program, arguments, donate=(0,))
    assert kernels_of(report) == {"paged_decode_attention": LAYERS}
    assert report.aliased == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0]))
    assert_compiled_in_place(report, arguments[0])


@pytest.mark.aot
def test_pools_of_latents_are_updated_in_place():
    """Filter layers hold int4 pages, whose program reads all of them or a list, the others latents; each has open pages
    apart, a few of each layer: sealing latents takes tokens first, heads second, and the compiler may lay them out so.
    What kernels make beside pools does not shrink with them: partial results of rows."""
    assert cuda.available() is None, cuda.available()
    config = dataclasses.replace(LLAMA_8B, num_layers=LAYERS, windows=())
    setup = Setup(config, 32, 4096, implementation=("mosaic_gpu", "xla"), sparsity="deltakv", filters=(0, 1))
    program, arguments = setup.shapes(StepKey(chunk=0, rows=setup.rows))
    report = cuda.compile(program, arguments, donate=(0,))
    assert kernels_of(report) == {
        "deltakv_decode_attention": LAYERS - 2,
        "quantized_decode_attention": 2 * 2,
        "paged_decode_attention": LAYERS - 2 + 2 * 2,
    }
    assert report.aliased == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0]))
    open_pages = setup.group.layouts[-1].open
    assert open_pages.pool_bytes < setup.pool_bytes / 100
    assert_compiled_in_place(report, arguments[0], share=4, besides=[open_pages.shape])


def kernels_of(report: Report) -> Counter[str]:
    """How many kernels of each name."""
    return Counter(kernel.name.rpartition("_")[0] for kernel in report.kernels)
