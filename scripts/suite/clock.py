"""How long a function takes on the device, without what it costs to launch it from Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def chained(function: Callable[..., Any]) -> Callable[..., Any]:
    """(n, x, *rest) -> function(x, *rest) applied n times, each on the result of the one before.

    The barrier keeps the compiler from moving out of the loop what depends on `rest` alone.
    """

    def many(n, x, *rest):
        def once(_, x):
            x, given = lax.optimization_barrier((x, rest))
            return function(x, *given).astype(x.dtype)

        return lax.fori_loop(0, n, once, x)

    return jax.jit(many)


def seconds(function: Callable[..., Any], *arguments: Any, target: float = 0.1, rounds: int = 3) -> float:
    """Seconds per call of `function(x, *rest) -> like x`, the least of `rounds` loops of about `target`
    seconds."""
    many = chained(function)

    def loop(n: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(many(jnp.int32(n), *arguments))
        return time.perf_counter() - start

    loop(1)  # compiles
    once = min(loop(1) for _ in range(2))
    few = loop(4)
    each = max((few - once) / 3, 1e-7)
    count = int(min(2000, max(4, target / each)))
    return min(loop(count) for _ in range(rounds)) / count


def copy_bandwidth(size: int) -> dict[str, float]:
    """Bytes per second of copying `size` bytes on the device (read and written bytes counted), and of
    reading."""
    x = jnp.zeros(size // 4, jnp.float32)
    copied = seconds(lambda x: x + 1, x)
    read = seconds(lambda total, x: total + x.sum(), jnp.float32(0), x)
    return {"copy_bytes_per_s": 2 * x.nbytes / copied, "read_bytes_per_s": x.nbytes / read}


def alive() -> bool:
    """Whether the device still computes: an illegal access leaves it unusable for the process."""
    try:
        return int(jnp.int32(20) + jnp.int32(22)) == 42
    except Exception:  # noqa: BLE001 (any failure of the simplest sum is the answer)
        return False
