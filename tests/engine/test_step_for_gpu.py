"""The engine's decode step, compiled for one H200 with the kernels: its pools are updated where they lie."""

from __future__ import annotations

import dataclasses
import re

import jax
import pytest
from suite.decode_step import LLAMA_8B, Setup

from pallas_kernels.aot import cuda
from sparsejax.engine.step import StepKey

LAYERS = 4


@pytest.mark.aot
@pytest.mark.parametrize("steps", (1, 4))
def test_pools_are_updated_in_place(steps: int):
    assert cuda.available() is None, cuda.available()
    config = dataclasses.replace(LLAMA_8B, num_layers=LAYERS, windows=())
    setup = Setup(config, rows=32, context=4096, implementation=("mosaic_gpu", "xla"))
    program, arguments = setup.shapes(StepKey(chunk=0, rows=setup.rows, num_steps=steps))
    report = cuda.compile(program, arguments, donate=(0,))
    assert report.problems() == []
    assert [kernel.name.rpartition("_")[0] for kernel in report.kernels] == ["paged_decode_attention"] * LAYERS
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0]))
    assert report.aliased == state > setup.pool_bytes
    assert report.temporary < setup.pool_bytes / 8
    (dims,) = {",".join(map(str, pool.shape)) for pool in jax.tree.leaves(arguments[0].kv)}
    copies = re.findall(rf"\[{dims}\]\S* (?:copy|copy-start|convert|transpose)\(.*", report.text)
    assert not copies, copies
