"""The engine's decode step, compiled for one TPU with the kernels: its pools are updated where they lie."""

from __future__ import annotations

import dataclasses
import re

import jax
import pytest
from suite.decode_step import LLAMA_8B, Setup

from pallas_kernels.aot import tpu
from sparsejax.engine.step import StepKey

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
    assert report.problems() == []
    assert len(report.kernels) == LAYERS
    pools = jax.tree.leaves(arguments[0].kv)
    assert sum(pool.size * pool.dtype.itemsize for pool in pools) == setup.pool_bytes
    assert report.aliased >= setup.pool_bytes
    assert report.temporary < setup.pool_bytes / 8
    (dims,) = {",".join(map(str, pool.shape)) for pool in pools}
    copies = re.findall(rf"\[{dims}\]\S* (?:copy|copy-start|convert|transpose)\(.*", report.text)
    assert not copies, copies
