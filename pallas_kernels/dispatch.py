"""Choice of the implementation that serves an op.

An op is a folder `pallas_kernels/<op>/`; a backend is a module in it that has one function with the op's name
and signature. Backends are imported when first asked for, and one that is absent, or whose own imports are
not installed, counts as a decline like any other. A backend that cannot serve a case raises `Declined` with
the reason, while it is traced; the next candidate is then tried.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

type Implementation = str | Sequence[str] | None

BACKENDS = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")

_BY_PLATFORM: Mapping[str, tuple[str, ...]] = {
    "gpu": ("mosaic_gpu", "xla"),
    "cuda": ("mosaic_gpu", "xla"),
    "tpu": ("mosaic_tpu", "xla"),
}


class Declined(NotImplementedError):
    """A backend cannot serve these arguments; the message says which property of them it lacks."""


class NoImplementation(NotImplementedError):
    """Every candidate declined. `reasons` maps each one to what it said."""

    def __init__(self, op: str, reasons: Mapping[str, str]):
        self.op, self.reasons = op, dict(reasons)
        listed = "".join(f"\n  {name}: {reason}" for name, reason in self.reasons.items())
        super().__init__(f"no implementation of {op} serves these arguments:{listed}")


def candidates(implementation: Implementation = None, platform: str | None = None) -> tuple[str, ...]:
    """Names of the backends to try, best first. `platform` is the default one of JAX where it is not
    given."""
    if implementation is None:
        return _BY_PLATFORM.get(platform or jax.default_backend(), ("xla",))
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        known = ", ".join(BACKENDS)
        raise ValueError(f"implementation must name one or more of {known}; got {implementation!r}")
    return names


def backend(op: str, name: str) -> Callable[..., Any]:
    """The function that implements `op` in backend `name`; raises `Declined` where there is none."""
    module = f"{__package__}.{op}.{name}"
    try:
        return getattr(importlib.import_module(module), op)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise Declined(f"{op} has no {name} backend") from None
        raise Declined(f"needs the module {error.name}, which is not installed") from error


def dispatch(op: str, implementation: Implementation, *args: Any, **kwargs: Any) -> Any:
    """Calls the first candidate that does not decline."""
    reasons: dict[str, str] = {}
    for name in candidates(implementation):
        try:
            return backend(op, name)(*args, **kwargs)
        except Declined as declined:
            reasons[name] = str(declined)
    raise NoImplementation(op, reasons)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str | None, dict[str, str]]:
    """Which backend serves `op` for these arguments, and why the other ones do not.

    Nothing is computed: arrays may be given as `jax.ShapeDtypeStruct`. `implementation` limits the candidates
    as in the op itself. Returns (name of the chosen backend or None, reason per backend that does not serve);
    the reference is listed only where it was asked for.
    """
    name = op if isinstance(op, str) else op.__name__
    return explain_among(candidates(kwargs.pop("implementation", None)), name, *args, **kwargs)


def explain_among(
    names: Sequence[str], op: str, *args: Any, platform: str | None = None, **kwargs: Any
) -> tuple[str | None, dict[str, str]]:
    """`explain` for these candidates, which are those of `platform` (default: JAX's)."""
    public = getattr(importlib.import_module(__package__), op)
    reasons = {
        other: f"is not tried on {platform or jax.default_backend()}"
        for other in BACKENDS
        if other not in names and other != "reference"
    }
    for candidate in names:
        try:
            _trace(public, args, {**kwargs, "implementation": candidate})
        except NoImplementation as error:
            reasons |= error.reasons
        else:
            return candidate, reasons
    return None, reasons


def holds_arrays(value: Any) -> bool:
    """Whether an argument is an array, concrete or abstract, or a tree of them."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def _trace(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Traces `function` with its arrays abstract and everything else as given."""
    given = {**dict(enumerate(args)), **kwargs}
    arrays = {key: value for key, value in given.items() if holds_arrays(value)}

    def call(arrays: dict[Any, Any]) -> Any:
        merged = given | arrays
        return function(*(merged[i] for i in range(len(args))), **{k: merged[k] for k in kwargs})

    # The keys of one pytree mapping must be comparable: positions become names.
    names = {str(key): key for key in arrays}
    jax.eval_shape(
        lambda named: call({names[name]: array for name, array in named.items()}),
        {name: arrays[key] for name, key in names.items()},
    )
