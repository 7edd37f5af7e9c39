"""How Mosaic TPU kernels run: compiled (the default), or interpreted where there is no TPU.

`True` is the fast interpreter (numbers only), a `pltpu.InterpretParams` the TPU simulator (copies,
semaphores, races).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from jax.experimental.pallas import tpu as pltpu

type Interpret = bool | pltpu.InterpretParams

_MODE: ContextVar[Interpret] = ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpreting(how: Interpret = True) -> Iterator[None]:
    """Kernels traced inside run interpreted. Functions that were jitted before keep what they were traced
    with."""
    token = _MODE.set(how)
    try:
        yield
    finally:
        _MODE.reset(token)


def mode(given: Interpret | None) -> Interpret:
    """The backend's own argument where it was given, the context's otherwise."""
    return _MODE.get() if given is None else given
