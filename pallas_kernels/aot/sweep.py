"""Takes cases through lowering or compilation and keeps what happened to each."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator

from pallas_kernels.aot.cases import Case, Target
from pallas_kernels.aot.report import Line
from pallas_kernels.dispatch import NoImplementation

PLATFORMS = {"cuda": "pallas_kernels.aot.cuda", "tpu": "pallas_kernels.aot.tpu"}
# What a lowered program calls a kernel of ours.
CALLS = {"cuda": "mosaic_gpu_v2", "tpu": "tpu_custom_call"}


def target(platform: str) -> Target:
    """The module that compiles for a platform."""
    return importlib.import_module(PLATFORMS[platform])


def lowered(cases: Iterable[Case], target: Target) -> Iterator[Line]:
    """Lowers each case with plain jaxlib; a program without a kernel of ours is an error."""
    for case in cases:
        try:
            text = target.lower(*case.build(target))
        except NoImplementation as declined:
            yield Line(str(case), target.PLATFORM, declined=declined.reasons[target.BACKEND])
        except Exception as error:  # noqa: BLE001 (a compiler may raise anything)
            yield Line(str(case), target.PLATFORM, error=_first_line(error))
        else:
            missing = None if CALLS[target.PLATFORM] in text else "lowered to a program without a kernel"
            yield Line(str(case), target.PLATFORM, error=missing)


def compiled(cases: Iterable[Case], target: Target, device: str) -> Iterator[Line]:
    """Compiles each case for one device."""
    for case in cases:
        try:
            yield Line(str(case), device, target.compile(*case.build(target), device))
        except NoImplementation as declined:
            yield Line(str(case), device, declined=declined.reasons[target.BACKEND])
        except Exception as error:  # noqa: BLE001
            yield Line(str(case), device, error=_first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
