"""Checks that the settings of every server share. Imports nothing of a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsejax.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}.")


def above_zero(options: Any, *names: str) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise ConfigError(f"{name}={getattr(options, name)!r} must be above 0.")


def at_least_zero(options: Any, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 0:
            raise ConfigError(f"{name}={getattr(options, name)!r} must be at least 0.")


def check_server(options: Any) -> None:
    """What a server of any protocol has: a port, keys, a level of its logs, time to shut down.

    Raises:
        ConfigError: one of them cannot be used.
    """
    one_of("log_level", options.log_level, LEVELS)
    if not 0 <= options.port < 65536:
        raise ConfigError(f"port={options.port} is no port; give 0 to 65535.")
    if any(not key.isascii() or not key.isprintable() or not key for key in options.api_key):
        raise ConfigError("api_key must be printable ASCII text that is not empty: it travels in a header.")
    at_least_zero(options, "shutdown_timeout")
