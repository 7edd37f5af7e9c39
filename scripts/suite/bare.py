"""Lets the packages be imported where only jax, flax and numpy are installed."""

from __future__ import annotations

import importlib
import sys
import types


class _Annotation:
    """Stands for any array annotation; they are strings that nobody evaluates outside of the tests."""

    def __class_getitem__(cls, item: object) -> type:
        return cls


def install() -> None:
    """Provides the names of jaxtyping if it is not installed."""
    try:
        importlib.import_module("jaxtyping")
    except ImportError:
        module = types.ModuleType("jaxtyping")
        module.__getattr__ = lambda name: _Annotation  # type: ignore[method-assign]
        sys.modules["jaxtyping"] = module
