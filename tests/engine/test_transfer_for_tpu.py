"""Transfers of pages, compiled for one TPU: pools stay where they are, and copies run beside other work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from suite.decode_step import LLAMA_8B, Setup

from pallas_kernels.aot import tpu
from sparsejax.engine.transfer import kinds_of, load_pages, save_pages

SIZE = 4
HOST = "S(5)"
"""The compiler's name for pinned host memory."""


@pytest.mark.aot
@pytest.mark.parametrize("way", ("save", "load"))
def test_pages_travel_by_asynchronous_copies(way):
    assert tpu.available() is None, tpu.available()
    setup = Setup(dataclasses.replace(LLAMA_8B, num_layers=2, windows=()), rows=4, context=1024, platform="tpu")
    device = NamedSharding(tpu.mesh(tpu.TARGETS[0]), PartitionSpec())

    def placed(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=device)

    state = jax.tree.map(placed, jax.eval_shape(setup.state))
    ids, kinds = placed(jax.ShapeDtypeStruct((SIZE,), jnp.int32)), kinds_of(state)
    host = device.with_memory_kind("pinned_host")
    page = tuple(jax.ShapeDtypeStruct(kind.page_shape, kind.dtype, sharding=host) for kind in kinds)
    if way == "save":
        program, arguments = save_pages(kinds, SIZE), (state, ids)
    else:
        program, arguments = load_pages(kinds), (state, ids, (page,) * SIZE)
    compiled = jax.jit(program, donate_argnums=0).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= setup.pool_bytes
    assert memory.temp_size_in_bytes < setup.pool_bytes / 8
    moved = {"save": memory.host_output_size_in_bytes, "load": memory.host_argument_size_in_bytes}
    assert moved[way] == SIZE * sum(kind.page_bytes for kind in kinds)
    starts = [line for line in compiled.as_text().splitlines() if " copy-start(" in line and HOST in line]
    assert len(starts) == SIZE * len(kinds)
