"""sparsejax: a sparse-first LLM inference engine in JAX.

``import sparsejax`` is instant and imports no JAX: the names below load their modules when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsejax import errors

if TYPE_CHECKING:
    from sparsejax.config import EngineConfig
    from sparsejax.engine.async_engine import AsyncEngine
    from sparsejax.engine.engine import Engine
    from sparsejax.engine.request import CompletionOutput, RequestOutput, SamplingParams

_HOMES = {
    "Engine": "sparsejax.engine.engine",
    "AsyncEngine": "sparsejax.engine.async_engine",
    "EngineConfig": "sparsejax.config",
    "SamplingParams": "sparsejax.engine.request",
    "RequestOutput": "sparsejax.engine.request",
    "CompletionOutput": "sparsejax.engine.request",
}

__all__ = [
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sparsejax")
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
