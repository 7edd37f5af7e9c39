"""Runs the conformance cases on pools in the TPU layouts, with the kernels interpreted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pallas_kernels import kv_write, layouts
from pallas_kernels.mosaic_tpu.interpret import interpreting


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
        pools, lanes = layouts.tpu_pools(head_dim)
        packed = layouts.pack(k_pages, v_pages, lanes, pools)
        packed = tuple(None if p is None else np.asarray(p) for p in packed)
        result = super().run(op, *before, *packed, *after, **options)
        if op is not kv_write:
            return result
        return tuple(np.asarray(x) for x in layouts.views(*result, head_dim))


def _split(op: Callable[..., Any], arrays: tuple) -> tuple:
    at = 0 if op is kv_write else 1
    return arrays[:at], arrays[at], arrays[at + 1], arrays[at + 2 :]
