"""Where a Mosaic GPU kernel will run: a CUDA device, a device that is only described, or the simulator."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import Declined

SHARED_BYTES = 227 * 1024
PAGES = (16, 32, 64, 128)

_simulator: contextvars.ContextVar[plgpu.InterpretGPUParams | None] = contextvars.ContextVar("simulator", default=None)

# Device kinds without the tensor memory accelerator, by what their names contain.
_OLDER = ("V100", "T4", "A100", "A10", "A30", "A40", "L4", "RTX 20", "RTX 30", "RTX 40", "RTX A")


@contextlib.contextmanager
def simulated(params: plgpu.InterpretGPUParams | None = None) -> Iterator[None]:
    """Runs the kernels traced inside in the simulator on CPU; `params` default to one with race detection."""
    token = _simulator.set(params or plgpu.InterpretGPUParams(detect_races=True))
    try:
        yield
    finally:
        _simulator.reset(token)


def simulator() -> plgpu.InterpretGPUParams | None:
    """Parameters of the simulator that kernels traced here run in; None means a real or described device."""
    return _simulator.get()


@contextlib.contextmanager
def described(device_kind: str = "NVIDIA H200") -> Iterator[None]:
    """Traces and lowers for a CUDA device of this kind where none is present."""
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the CUDA device that is traced for; None where it is not a CUDA device."""
    described_device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described_device is not None and described_device.platform in ("gpu", "cuda"):
        kind = described_device.device_kind
        if any(name in kind for name in ("H100", "H200", "H20", "H800", "GH200")):
            return 9, 0
        return (8, 0) if any(name in kind for name in _OLDER) else (10, 0)
    if jax.default_backend() not in ("gpu", "cuda"):
        return None
    major, minor = str(jax.local_devices()[0].compute_capability).split(".")[:2]
    return int(major), int(minor)


def require(condition: bool, reason: str) -> None:
    """Declines with `reason` unless the condition holds."""
    if not condition:
        raise Declined(reason)


def require_tma(exactly_hopper: bool = False) -> None:
    """Declines devices without the bulk tensor copies (or, if asked, without the warpgroup products) that
    we use."""
    if simulator() is not None:
        return
    capability = compute_capability()
    require(capability is not None, f"needs a CUDA GPU; the default platform is {jax.default_backend()}")
    require(
        capability >= (9, 0),
        f"needs compute capability 9.0 or newer (bulk tensor copies); got {capability[0]}.{capability[1]}",
    )
    if exactly_hopper:
        require(
            capability[0] == 9,
            f"warpgroup products exist on compute capability 9.x only; got {capability[0]}.{capability[1]}",
        )


def require_plain(k_pages: jax.Array, v_pages: jax.Array | None, head_dim: int) -> None:
    """Declines pools in the shapes that only a TPU needs."""
    require(v_pages is not None, "keys and values must have a pool each; got one for both")
    require(
        k_pages.shape[-1] == head_dim,
        f"pools must not be padded; got {k_pages.shape[-1]} lanes for head dim {head_dim}",
    )


def require_operands(dtype: jnp.dtype) -> None:
    """Declines what tensor cores do not multiply as it is."""
    require(
        dtype in (jnp.bfloat16, jnp.float16),
        f"tensor cores multiply bfloat16 and float16 here (float32 would be rounded to tf32); got {dtype}",
    )


def require_pages(q: jax.Array, k_pages: jax.Array) -> None:
    """Declines dense pages that the kernels do not copy into operands of products with q."""
    require(q.dtype == k_pages.dtype, f"queries and pages must share a dtype; got {q.dtype} and {k_pages.dtype}")
    require_operands(q.dtype)
    page, head_dim = k_pages.shape[2:]
    require(page in PAGES, f"page size must be one of {PAGES}; got {page}")
    require(
        head_dim % 16 == 0 and 32 <= head_dim <= 256,
        f"head dim must be a multiple of 16 from 32 to 256; got {head_dim}",
    )


def require_shared(used: int) -> None:
    """Declines blocks that do not fit the shared memory of a multiprocessor."""
    require(used <= SHARED_BYTES, f"needs {used} bytes of shared memory per block; {SHARED_BYTES} are available")
