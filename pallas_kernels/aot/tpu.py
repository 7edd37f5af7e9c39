"""Compiles for one TPU chip on a machine without one and reports what each kernel takes.

Needs libtpu (`jax[tpu]`), no device.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import codes, layouts
from pallas_kernels.aot.report import Kernel, Report
from pallas_kernels.mosaic_tpu.limits import VMEM

PLATFORM, BACKEND = "tpu", "mosaic_tpu"
CALL = "tpu_custom_call"
LIMITS = {"VMEM bytes": VMEM}
# The smallest slice of each kind whose chips the compiler can be asked about; programs are compiled for one chip.
SLICES = {"TPU v5e": "v5e:2x2", "TPU v6e": "v6e:2x2", "TPU v5p": "v5p:2x2x1"}
TARGETS = tuple(SLICES)
# libtpu asks these of its host; without them it looks for a TPU.
HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_SKIP_MDS_QUERY": "1"}


def available() -> str | None:
    """None if programs can be compiled for TPUs here, else the reason why not."""
    try:
        mesh(TARGETS[0])
    except (NotImplementedError, RuntimeError, ImportError) as error:
        return f"no libtpu: {error}".splitlines()[0]
    return None


@functools.cache
def mesh(target: str) -> Mesh:
    """A mesh of one chip that is not there."""
    for name, value in HOST.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(SLICES[target], "tpu")
    return Mesh(np.array(topology.devices[:1]), ("x",))


def pools(pages: int, kv_heads: int, page: int, head_dim: int, dtype: Any) -> tuple[Any, Any]:
    """K and V pools of one layer; one pool and None where they are stored side by side."""
    count, lanes = layouts.tpu_pools(head_dim)
    pool = jax.ShapeDtypeStruct((pages, kv_heads, page, lanes), dtype)
    return pool, pool if count == 2 else None


def coded_pools(pages: int, kv_heads: int, page: int, head_dim: int, codec: str) -> tuple[Any, Any, Any]:
    """Codes of K and V of one layer, side by side where heads are narrow, and their scales in bfloat16."""
    count, lanes = layouts.tpu_pools(head_dim)
    rows = page // 2 if codec == "int4" else page
    pool = jax.ShapeDtypeStruct((pages, kv_heads, rows, lanes), codes.DTYPES[codec])
    width = -(-codes.scales_width(codec, page, head_dim) // layouts.LANES) * layouts.LANES
    return pool, pool if count == 2 else None, jax.ShapeDtypeStruct((pages, kv_heads, width), jnp.bfloat16)


def lower(function: Callable[..., Any], arguments: Sequence[Any]) -> str:
    """The program as plain jaxlib lowers it for any TPU."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(PLATFORM,)).as_text()


def compile(  # noqa: A001 (the name that every target module has)
    function: Callable[..., Any],
    arguments: Sequence[Any],
    target: str = TARGETS[0],
    donate: Sequence[int] = (),
) -> Report:
    """Compiles `function` for one chip. `arguments` is a pytree of jax.ShapeDtypeStruct per positional
    argument."""
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh(target), PartitionSpec())),
        tuple(arguments),
    )
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program tells no compile time
    try:
        start = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=tuple(donate)).lower(*placed)
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        kernels=tuple(_kernels(text)),
        lower_seconds=middle - start,
        compile_seconds=end - middle,
        temporary=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        text=text,
    )


def _kernels(text: str) -> Iterator[Kernel]:
    """Custom calls of ours with the VMEM that the compiler gave them."""
    for line in text.splitlines():
        if f'custom_call_target="{CALL}"' not in line:
            continue
        # XLA may keep whole operands in VMEM; the kernel's own part starts behind them and "used" counts from 0.
        granted, used = (_vmem(line, name) for name in ("scoped_memory_configs", "used_scoped_memory_configs"))
        yield Kernel(
            name=re.match(r"\s*(?:ROOT )?%?([\w-]+)", line)[1],
            resources={"VMEM bytes": used["size"] - granted["offset"]},
            limits=LIMITS,
        )


def _vmem(line: str, name: str) -> dict[str, int]:
    """Offset and size of the memory of space 1 in the list `name` of a custom call."""
    (found,) = re.findall(rf'"{name}":\[{{"memory_space":"1","offset":"(\d+)","size":"(\d+)"}}\]', line)
    return dict(zip(("offset", "size"), map(int, found), strict=True))
