"""Ops that update what they are given do so in place: read off the compiled programs."""

from __future__ import annotations

import functools
import math
import re

import jax
import pytest

import pallas_kernels
from pallas_kernels.aot import sweep
from pallas_kernels.aot.report import Report
from pallas_kernels.workload import UPDATES, Call, Workload

# 4097 pages of which 16 are written: what a copy of a pool takes is far above what the op needs beside it.
SIZES = {"rows": 256, "listed": 16, "tokens": 16}
CASES = [("kv_write", "int8"), ("page_bounds", "int8")]
CASES += [(op, codec) for op in ("quantize_pages", "open_pages") for codec in ("int8", "int4")]
each_case = pytest.mark.parametrize(("op", "codec"), CASES)


def split(op: str, call: Call) -> tuple[Call, Call, Call]:
    """The arguments that are updated, the other arrays, and what is static."""
    updated = {name: call[name] for name in UPDATES[op] if call[name] is not None}
    others = {name: value for name, value in call.items() if hasattr(value, "shape") and name not in updated}
    return updated, others, {name: value for name, value in call.items() if name not in updated | others}


def once(op: str, static: Call, updated: Call, others: Call) -> Call:
    """One call, its results under the names of what they replace."""
    function = functools.partial(getattr(pallas_kernels, op), **static)
    results = function(**updated, **others)
    results = results if isinstance(results, tuple) else (results,)
    return {name: result for name, result in zip(UPDATES[op], results, strict=True) if name in updated}


def in_a_loop(op: str, static: Call, updated: Call, others: Call) -> Call:
    """Four calls, each on other pages."""

    def step(i, updated):
        named = "targets" if "targets" in others else "page_ids"
        return once(op, static, updated, others | {named: others[named] + i})

    return jax.lax.fori_loop(0, 4, step, updated)


def size(arrays: Call) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())


def copies(text: str, arrays: Call) -> list[str]:
    """Instructions that write a whole new array in the shape of one that is updated."""
    shapes = {",".join(map(str, array.shape)) for array in arrays.values()}
    return [line for dims in shapes for line in re.findall(rf"\[{dims}\]\S* (?:copy|convert|transpose)\(.*", text)]


@pytest.mark.parametrize("program", (once, in_a_loop))
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
@each_case
def test_no_pool_is_copied(op, codec, dtype, program):
    updated, others, static = split(op, Workload(dtype=dtype, codec=codec, **SIZES).calls()[op])
    static["implementation"] = "xla"
    lowered = jax.jit(functools.partial(program, op, static), donate_argnums=0).lower(updated, others)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == size(updated)
    assert memory.temp_size_in_bytes < size(updated) / 4
    assert not copies(compiled.as_text(), updated)


@pytest.mark.aot
@pytest.mark.parametrize("platform", sweep.PLATFORMS)
@each_case
def test_no_pool_is_copied_on_devices(op, codec, platform):
    target = sweep.target(platform)
    reason = target.available()
    assert reason is None, reason
    sizes = SIZES | {"kv_heads": 8, "heads": 32, "head_dim": 128}
    updated, others, static = split(op, Workload(codec=codec, platform=platform, **sizes).calls()[op])
    static["implementation"] = (target.BACKEND, "xla")
    for program in (once, in_a_loop):
        report: Report = target.compile(
            functools.partial(program, op, static), (updated, others), target.TARGETS[0], donate=(0,)
        )
        assert report.aliased == size(updated), program
        assert report.temporary < size(updated) / 4, program
        assert not copies(report.text, updated), program
