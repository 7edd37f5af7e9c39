"""Compiles for one H200 on a machine without a GPU and reports what each kernel takes.

Needs the CUDA plugin of JAX and its compiler (`nvidia-cuda-nvcc`), no driver and no device.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import codes
from pallas_kernels.aot.report import Kernel, Report
from pallas_kernels.mosaic_gpu.target import described

PLATFORM, BACKEND, TARGETS = "cuda", "mosaic_gpu", ("NVIDIA H200",)
CALL = "mosaic_gpu_v2"
LIMITS = {"registers": 255, "spilled bytes": 0, "shared memory": 227 * 1024}

# The constants of an H200 that the compiler asks a device for, in its text format.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" device_address_bits: 64
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
"""


def available() -> str | None:
    """None if programs can be compiled for CUDA here, else the reason why not."""
    try:
        mesh()
    except (NotImplementedError, RuntimeError) as error:
        return f"no CUDA plugin: {error}".splitlines()[0]
    return None


@functools.cache
def mesh() -> Mesh:
    """A mesh of one H200 that is not there."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return Mesh(np.array(topology.devices[:1]), ("x",))


def pools(pages: int, kv_heads: int, page: int, head_dim: int, dtype: Any) -> tuple[Any, Any]:
    """K and V pools of one layer."""
    pool = jax.ShapeDtypeStruct((pages, kv_heads, page, head_dim), dtype)
    return pool, pool


def coded_pools(pages: int, kv_heads: int, page: int, head_dim: int, codec: str) -> tuple[Any, Any, Any]:
    """Codes of K and V and their scales, of one layer."""
    rows = page // 2 if codec == "int4" else page
    pool = jax.ShapeDtypeStruct((pages, kv_heads, rows, head_dim), codes.DTYPES[codec])
    width = codes.scales_width(codec, page, head_dim)
    return pool, pool, jax.ShapeDtypeStruct((pages, kv_heads, width), jnp.bfloat16)


def lower(function: Callable[..., Any], arguments: Sequence[Any]) -> str:
    """The program for an H200 as plain jaxlib lowers it."""
    with described(TARGETS[0]):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(PLATFORM,)).as_text()


def compile(  # noqa: A001 (the name that every target module has)
    function: Callable[..., Any],
    arguments: Sequence[Any],
    target: str = TARGETS[0],
    donate: Sequence[int] = (),
) -> Report:
    """Compiles `function` for one H200. `arguments` is a pytree of jax.ShapeDtypeStruct per positional
    argument."""
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh(), PartitionSpec())),
        tuple(arguments),
    )
    with tempfile.TemporaryDirectory() as folder, _dumping(folder), jax.set_mesh(mesh()):
        start = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=tuple(donate)).lower(*placed)
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        kernels = tuple(_kernels(Path(folder)))
    memory = compiled.memory_analysis()
    return Report(
        kernels=kernels,
        lower_seconds=middle - start,
        compile_seconds=end - middle,
        temporary=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        text=compiled.as_text(),
    )


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Has the Mosaic compiler write what the assembler reports. A cached program would not be compiled at
    all."""
    ours = {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": folder}
    before = {name: os.environ.get(name) for name in ours}
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.update(ours)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _kernels(folder: Path) -> Iterator[Kernel]:
    for assembled in sorted(folder.glob("*.ptxas")):
        text = assembled.read_text()
        resources = assembled.with_suffix(".resources.txt").read_text()
        yield Kernel(
            name=assembled.stem,
            resources={
                "registers": max(int(n) for n in re.findall(r"Used (\d+) registers", text)),
                "spilled bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)),
                "shared memory": int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
            },
            limits=LIMITS,
        )
