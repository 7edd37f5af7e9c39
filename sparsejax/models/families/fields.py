"""Reading single fields of a ``config.json``. Null and an absent key mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.errors import ConfigError

Raw = Mapping[str, Any]


def value(raw: Raw, key: str, default: Any = None) -> Any:
    """``raw[key]``, where an absent key and null both mean ``default``."""
    found = raw.get(key)
    return default if found is None else found


def number(raw: Raw, key: str, default: float | None = None) -> float | None:
    """A number as float, None if absent without a default; ConfigError if it is anything else."""
    found = value(raw, key, default)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise ConfigError(f"{key} must be a number, got {found!r}")
    return float(found)


def integer(raw: Raw, key: str, default: int | None = None) -> int:
    """A positive integer; ConfigError if it is anything else, or absent without a default."""
    found = value(raw, key, default)
    if found is None:
        raise ConfigError(f"config.json lacks {key!r}, which this family needs")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ConfigError(f"{key} must be a positive integer, got {found!r}")
    return found


def needed_number(raw: Raw, key: str) -> float:
    """A number as float; ConfigError if it is absent or anything else."""
    found = number(raw, key)
    if found is None:
        raise ConfigError(f"config.json lacks {key!r}, which its rope type needs")
    return found
