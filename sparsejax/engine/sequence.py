"""A sequence as the scheduler sees it: its tokens, how far they are computed, and its pages."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

PENDING = -1
"""Stands for an output token that a dispatched step will produce and the host has not read yet."""


class Status(enum.Enum):
    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One output stream of one request.

    Attributes:
        tokens: prompt, then outputs; outputs still on the device are `PENDING`.
        num_prompt: tokens of the prompt.
        max_tokens: most outputs; the sum with the prompt fits the engine's ``max_model_len``.
        order: sort key ``(priority, arrival, index)``; smaller runs first.
        num_computed: leading tokens whose keys and values are in pages, or will be once every dispatched
            step has run.
        pages: page ids by logical index.
        row: the slot of the device state it holds while it runs, or -1.
        needs_history: the host must know every earlier token before it samples the next one.
    """

    tokens: list[int]
    max_tokens: int
    order: tuple
    needs_history: bool = False
    num_prompt: int = field(init=False)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    row: int = -1
    status: Status = Status.NEW

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def num_outputs(self) -> int:
        """Outputs known or on their way."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Outputs that may still be scheduled."""
        return self.max_tokens - self.num_outputs

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def has_pending(self) -> bool:
        return self.tokens[-1] == PENDING

    def resolve(self, at: int, token: int) -> None:
        """Replaces the pending token at index `at` by the one the device sampled."""
        self.tokens[at] = token
