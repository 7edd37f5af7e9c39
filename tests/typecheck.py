"""Checks the jaxtyping annotations of arrays, and only those, when the tests call our functions.

Other hints (protocols, callables, our own classes) are for readers; checking them too would make every test
double as a test of the hints.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin

from beartype import beartype
from jaxtyping import AbstractArray

PACKAGES = ("pallas_kernels", "sparsejax")
_CONTAINERS = (tuple, list, Sequence, Union, types.UnionType)
_PLAIN = (type(None), int, float, bool, Ellipsis)


def parts(hint: Any) -> list[Any]:
    """The hint itself, or what a union, tuple or list of hints is made of."""
    if get_origin(hint) in _CONTAINERS:
        return [part for argument in get_args(hint) for part in parts(argument)]
    return [hint]


def is_array_hint(hint: Any) -> bool:
    """Whether a hint speaks of arrays, and of nothing but arrays and plain values."""
    kinds = [inspect.isclass(part) and issubclass(part, AbstractArray) for part in parts(hint)]
    others = [part for part, is_array in zip(parts(hint), kinds, strict=True) if not is_array]
    return any(kinds) and all(part in _PLAIN for part in others)


def arrays_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with beartype on the parameters and results annotated as arrays.

    Constructors are left alone: JAX rebuilds our dataclasses around shapes, shardings and avals, which are no arrays.
    """
    if function.__name__ == "__init__":
        return function
    hints = {name: hint for name, hint in function.__annotations__.items() if is_array_hint(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)
