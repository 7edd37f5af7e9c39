"""Which backend serves which op, and why others do not."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels.dispatch import candidates, explain_among
from pallas_kernels.workload import Workload


@dataclasses.dataclass(frozen=True)
class Served:
    """An op, the backend that serves it (None: none does), and per other backend why it does not."""

    op: str
    backend: str | None
    declined: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.declined.items())
        return f"{self.op}: {self.backend or 'none'}" + (f" ({reasons})" if reasons else "")


def report(platform: str | None = None, workload: Workload | None = None) -> tuple[Served, ...]:
    """Asks every op for one usual call, by tracing it: nothing is compiled or computed.

    `platform` ("cpu", "gpu" or "tpu"; default: JAX's) decides which backends are candidates and how pools are
    laid out; backends that need its device still decline where there is none. `workload` gives other sizes,
    dtypes and codecs than the usual ones; its own platform decides the layout then.
    """
    platform = platform or jax.default_backend()
    workload = workload or Workload(platform=platform)
    names = candidates(platform=platform)
    return tuple(
        Served(op, *explain_among(names, op, platform=platform, **call)) for op, call in workload.calls().items()
    )
