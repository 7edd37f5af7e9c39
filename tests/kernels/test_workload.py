"""Every op at a usual call: what serves it is told, it lowers for every platform and updates pools in place."""

from __future__ import annotations

import functools
import json
import re

import bench_kernels
import jax
import pytest

import pallas_kernels
from pallas_kernels.dispatch import holds_arrays
from pallas_kernels.workload import UPDATES, Workload

OPS = tuple(Workload().calls())


def jitted(op: str, work: Workload):
    """(jitted function with the pools that it updates donated, abstract arguments)."""
    call = work.calls()[op]
    arrays = {name: value for name, value in call.items() if holds_arrays(value)}
    static = {name: value for name, value in call.items() if name not in arrays}
    function = functools.partial(getattr(pallas_kernels, op), implementation="xla", **static)
    donated = [name for name in UPDATES.get(op, ()) if name in arrays]
    return jax.jit(function, donate_argnames=donated), arrays


def test_the_report_names_every_op_once():
    public = {name for name in pallas_kernels.__all__ if name[0].islower()}
    ops = [served.op for served in pallas_kernels.report()]
    assert sorted(ops) == sorted(public - {"explain", "merge_partials", "report"})


@pytest.mark.parametrize("platform", ("cpu", "gpu", "tpu"))
def test_every_op_is_served_on_every_platform(platform):
    for served in pallas_kernels.report(platform):
        assert served.backend, str(served)
        assert "xla" not in served.declined
        assert set(served.declined) | {served.backend, "xla"} == {"mosaic_gpu", "mosaic_tpu", "xla"}
        assert str(served).startswith(f"{served.op}: {served.backend} (")


@pytest.mark.parametrize("op", OPS)
def test_xla_lowers_for_gpus_and_tpus(op):
    function, arrays = jitted(op, Workload(codec="int4", platform="tpu"))
    lowered = function.trace(**arrays).lower(lowering_platforms=("cuda", "tpu"))
    assert "stablehlo.custom_call" not in re.sub(r"custom_call @Sharding", "", lowered.as_text())


@pytest.mark.parametrize("codec", ("int8", "int4"))
@pytest.mark.parametrize("op", UPDATES)
def test_pools_are_updated_in_place(op, codec):
    if codec == "int4" and op in ("kv_write", "page_bounds"):
        return
    function, arrays = jitted(op, Workload(codec=codec, rows=64, listed=64))
    pools = jax.tree.leaves([arrays[name] for name in UPDATES[op]])
    compiled = function.lower(**arrays).compile()
    memory = compiled.memory_analysis()
    held = sum(pool.size * pool.dtype.itemsize for pool in pools)
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < held / 4
    for pool in pools:
        dims = ",".join(map(str, pool.shape))
        copies = re.findall(rf"\[{dims}\]\S* (?:copy|convert|transpose)\(.*", compiled.as_text())
        assert not copies, copies


def test_the_benchmark_times_every_op(capsys):
    sizes = ["--rows", "2", "--tokens-per-row", "64", "--selected-tokens", "32", "--chunk", "8", "--repeats", "1"]
    assert bench_kernels.main([*sizes, "--ops", "page_scores", "quantize_pages", "--codec", "int4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["ops"]) == {"page_scores", "quantize_pages"}
    assert all(timed["backend"] == "xla" and timed["min_ms"] > 0 for timed in printed["ops"].values())
