"""Checks shared by everything a request carries: each failure is a RequestError that names the fix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

from sparsejax.errors import RequestError


def reject(parameter: str, value: Any, allowed: str, fix: str = "") -> NoReturn:
    """Raise the RequestError for ``parameter``: what was given, what is allowed, what to do."""
    shown = repr(value)
    if len(shown) > 120:
        shown = shown[:117] + "..."
    message = f"{parameter}={shown} is not allowed: {parameter} must be {allowed}."
    raise RequestError(message + (f" {fix}" if fix else ""), parameter=parameter, value=value)


def check_int(
    parameter: str, value: Any, low: int | None, high: int | None, allowed: str, fix: str = ""
) -> int:
    """A whole number in [low, high]; anything with ``__index__`` but bool is taken."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        reject(parameter, value, allowed, fix)
    number = value.__index__()
    if (low is not None and number < low) or (high is not None and number > high):
        reject(parameter, value, allowed, fix)
    return number


def check_float(
    parameter: str,
    value: Any,
    low: float,
    high: float,
    allowed: str,
    fix: str = "",
    *,
    open_low: bool = False,
) -> float:
    """A finite number in [low, high], or in (low, high] with ``open_low``."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        reject(parameter, value, allowed, fix)
    number = float(value)
    outside = number <= low if open_low else number < low
    if not math.isfinite(number) or outside or number > high:
        reject(parameter, value, allowed, fix)
    return number


def check_bool(parameter: str, value: Any) -> bool:
    if not isinstance(value, bool):
        reject(parameter, value, "True or False")
    return value


def check_texts(parameter: str, value: Any) -> tuple[str, ...]:
    """None, one string or several non-empty strings, as a tuple without repeats."""
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    allowed = "a non-empty string or a list of non-empty strings"
    if not isinstance(items, Iterable) or isinstance(items, bytes | dict):
        reject(parameter, value, allowed)
    items = list(items)
    if any(not isinstance(item, str) or not item for item in items):
        reject(parameter, value, allowed, "Remove the empty or non-text entry.")
    return tuple(dict.fromkeys(items))


def check_ids(parameter: str, value: Any, limit: int | None = None) -> tuple[int, ...]:
    """None or several token ids, as a tuple without repeats."""
    if value is None:
        return ()
    allowed = "a list of token ids (whole numbers of at least 0)"
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | dict):
        reject(parameter, value, allowed)
    ids = tuple(dict.fromkeys(check_int(parameter, item, 0, 2**31 - 1, allowed) for item in value))
    if limit is not None and len(ids) > limit:
        reject(parameter, value, f"at most {limit} token ids ({len(ids)} were given)", "Give fewer ids.")
    return ids
