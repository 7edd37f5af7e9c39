"""The errors users meet. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

from typing import Any


class SparseJaxError(Exception):
    """Base of every error sparsejax raises on purpose."""


class ConfigError(SparseJaxError, ValueError):
    """An engine, model or policy setting is invalid or contradicts another one."""


class ModelError(SparseJaxError):
    """A checkpoint cannot be read: missing files, wrong tensors, unknown architecture."""


class RequestError(SparseJaxError, ValueError):
    """One request is invalid; the engine and every other request are unaffected.

    Attributes:
        parameter: name of the offending field (for example ``"top_p"``), or None.
        value: the value that was given.
        code: a fixed text that servers pass on to programs, or None.
    """

    def __init__(
        self, message: str, *, parameter: str | None = None, value: Any = None, code: str | None = None
    ):
        super().__init__(message)
        self.parameter = parameter
        self.value = value
        self.code = code


class ConversationError(RequestError):
    """A kept conversation cannot be continued: its `code` is ``"conversation_gone"``, ``"conversation_busy"`` (another
    request continues it) or ``"conversation_mismatch"`` (the prompt is not what was said so far, and more)."""


class CapacityError(SparseJaxError):
    """The request or the configuration needs more memory than there is."""


class StoreError(SparseJaxError):
    """A cache directory, compile cache or page store cannot be used."""
