"""Whether compiled steps update their state in place, read off the programs."""

from __future__ import annotations

import re

import jax

from pallas_kernels.aot.report import Report
from sparsejax.engine.state import DeviceState


def pool_copies(text: str, shape: tuple[int, ...]) -> list[str]:
    """Instructions of a compiled program that write a whole new array of a pool's shape."""
    dims = ",".join(map(str, shape))
    return re.findall(rf"\[{dims}\]\S* (?:copy|copy-start|convert|transpose)\(.*", text)


def assert_in_place(engine) -> None:
    """Every program of `engine` aliases its whole state and copies no pool and no bounds."""
    runner = engine.core.runner
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state))
    pools = {leaf.shape for leaf in jax.tree.leaves(runner.state.kv.pools)}
    shapes = pools | {leaf.shape for leaf in jax.tree.leaves(runner.state.kv.parts()["page_bounds"]) if leaf.ndim > 1}
    for key, program in runner.programs.items():
        memory, text = program.memory_analysis(), program.as_text()
        assert all(f"[{','.join(map(str, shape))}]" in text for shape in pools), key
        assert memory.alias_size_in_bytes == state_bytes, key
        for shape in shapes:
            assert not pool_copies(text, shape), (key, shape)


def assert_compiled_in_place(report: Report, state: DeviceState, share: int = 8) -> None:
    """A program compiled for a device aliases the pools of `state`, copies none and makes less beside them than one
    part of `share` of their bytes."""
    pools = jax.tree.leaves(state.kv)
    pool_bytes = sum(pool.size * pool.dtype.itemsize for pool in pools)
    assert report.problems() == []
    assert report.aliased >= pool_bytes
    assert report.temporary < pool_bytes / share
    for shape in {pool.shape for pool in pools}:
        assert not pool_copies(report.text, shape), shape
