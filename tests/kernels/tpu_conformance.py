"""Runs the conformance cases on pools in the TPU layouts, with the kernels interpreted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from pallas_kernels import kv_write, layouts
from pallas_kernels.mosaic_tpu.interpret import interpreting

from .cases import Spec


def quick(specs: Sequence[Spec], *names: str) -> list[Any]:
    """`specs` as parameters of a test, all but the named ones slow: interpreted kernels compile for seconds."""
    missing = set(names) - {spec.name for spec in specs}
    assert not missing, missing
    return [
        pytest.param(spec, id=spec.name, marks=() if spec.name in names else pytest.mark.slow) for spec in specs
    ]


class TpuLayout:
    """Mix in before a conformance class."""

    backend = "mosaic_tpu"

    @contextlib.contextmanager
    def interpreted(self) -> Iterator[None]:
        with interpreting():
            yield

    def run(self, op: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Calls `op` on the TPU layout of the pools that come as arguments."""
        before, k_pages, v_pages, after = _split(op, arrays)
        head_dim = k_pages.shape[-1]
        packed = in_tpu_layout(k_pages, v_pages)
        result = super().run(op, *before, *packed, *after, **options)
        if op is not kv_write:
            return result
        return tuple(np.asarray(x) for x in layouts.views(*result, head_dim))


def in_tpu_layout(k_pages: np.ndarray, v_pages: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Plain pools as a TPU stores them."""
    pools, lanes = layouts.tpu_pools(k_pages.shape[-1])
    return tuple(None if p is None else np.asarray(p) for p in layouts.pack(k_pages, v_pages, lanes, pools))


def in_whole_lanes(pool: np.ndarray, value: float) -> np.ndarray:
    """A pool of codes or of scales as a TPU stores it, its padding filled with `value`."""
    spare = -pool.shape[-1] % layouts.LANES
    return np.pad(pool, ((0, 0),) * (pool.ndim - 1) + ((0, spare),), constant_values=value)


def _split(op: Callable[..., Any], arrays: tuple) -> tuple:
    at = 0 if op is kv_write else 1
    return arrays[:at], arrays[at], arrays[at + 1], arrays[at + 2 :]
