"""`kv_write` updates donated pools in place: read off the compiled programs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import kv_write

SHAPE = (65, 2, 32, 64)
TOKENS = 4


def write_once(pools, new, at):
    return kv_write(*pools, *new, *at, implementation="xla")


def write_in_a_loop(pools, new, at):
    def step(i, pools):
        page, offset = at
        return kv_write(*pools, *new, page + i, offset, implementation="xla")

    return jax.lax.fori_loop(0, 4, step, pools)


@pytest.mark.parametrize("program", (write_once, write_in_a_loop))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_no_pool_is_copied(program, dtype):
    pool = jax.ShapeDtypeStruct(SHAPE, dtype)
    new = jax.ShapeDtypeStruct((TOKENS, SHAPE[1], SHAPE[3]), dtype)
    at = jax.ShapeDtypeStruct((TOKENS,), jnp.int32)
    compiled = jax.jit(program, donate_argnums=0).lower((pool, pool), (new, new), (at, at)).compile()
    memory = compiled.memory_analysis()
    pool_bytes = 2 * pool.size * pool.dtype.itemsize
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 8
    dims = ",".join(map(str, SHAPE))
    copies = re.findall(rf"\[{dims}\]\S* (?:copy|convert|transpose)\(.*", compiled.as_text())
    assert not copies, copies
