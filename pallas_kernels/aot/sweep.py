"""Takes cases through lowering or compilation and keeps what happened to each."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator

from pallas_kernels.aot.cases import Case, Target
from pallas_kernels.aot.report import Line
from pallas_kernels.dispatch import NoImplementation

PLATFORMS = tuple(name for name in ("cuda", "tpu") if importlib.util.find_spec(f"{__package__}.{name}") is not None)


def target(platform: str) -> Target:
    """The module that compiles for a platform."""
    return importlib.import_module(f"{__package__}.{platform}")


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
            missing = None if target.CALL in text else "lowered to a program without a kernel"
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
