"""The TPU simulator of JAX: runs kernels with their copies and semaphores, and tells races."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu.interpret import interpreting

# Copies happen when they are started, or as late as they can: when they are waited for. A missing wait is a race
# in one mode and shows stale memory in the other.
DMA_MODES = ("eager", "on_wait")


def simulate(mode: str, op: Callable[..., Any], *arrays: Any, **options: Any) -> tuple[Any, bool]:
    """Runs `op` with its kernels simulated: (result as NumPy, whether a race was found)."""
    static = {k: v for k, v in options.items() if not hasattr(v, "shape")}
    given = {k: v for k, v in options.items() if hasattr(v, "shape")}
    call = jax.jit(functools.partial(op, implementation="mosaic_tpu", **static))
    params = pltpu.InterpretParams(
        dma_execution_mode=mode, detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    try:
        with interpreting(params):
            result = jax.tree.map(np.asarray, call(*arrays, **given))
        races = simulator.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    return result, races
