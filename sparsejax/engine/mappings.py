"""Memory mappings of this process: on CPU compiled programs take about 400 each, and Linux bounds their number.

At the bound the compiler's loader dies with a segmentation fault, so what compiles asks here first.
"""

from __future__ import annotations

from pathlib import Path

from sparsejax.errors import CapacityError

HELD = Path("/proc/self/maps")
LIMIT = Path("/proc/sys/vm/max_map_count")
SHARE = 0.95
"""Of the limit, up to which programs are compiled: the rest is for the program itself and for the heap."""


def mappings() -> tuple[int, int] | None:
    """(held, limit) of this process; None where the system does not say."""
    try:
        with HELD.open("rb") as lines:
            return sum(1 for _ in lines), int(LIMIT.read_text())
    except OSError:
        return None


def check_mappings() -> None:
    """
    Raises:
        CapacityError: too few mappings are left to compile another program.
    """
    if (found := mappings()) is None:
        return
    held, limit = found
    if held > SHARE * limit:
        raise CapacityError(
            f"this process holds {held} memory mappings and the system allows {limit}; every program compiled for CPU "
            "takes about 400, and at the limit the process would crash. Shut down engines that are not needed "
            f"(Engine.shutdown), call jax.clear_caches(), or raise the limit: sysctl vm.max_map_count={4 * limit}."
        )
