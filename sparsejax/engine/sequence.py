"""A sequence as the scheduler sees it: its tokens, how far they are computed, and its pages."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsejax.sparsity.eviction import Eviction

if TYPE_CHECKING:
    from sparsejax.engine.conversation import Conversation
    from sparsejax.engine.saved_row import SavedRow

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
        eviction: when tokens leave its cache, if ever.
        evict_at: computed tokens at which the next eviction must run, before anything more is computed.
        num_groups: cache groups of the engine.
        shifts: by group, tokens that have left the cache; token t lies in slot ``t - shift`` of its pages.
        tables: by group, page ids by logical index.
        row: the slot of the device state it holds while it runs, or -1.
        needs_history: the host must know every earlier token before it samples the next one.
        root: where its chain of pages in the prefix cache begins; None: it neither reads nor fills the cache.
        most_cached: leading tokens that it may take from there; None leaves only its last one to compute.
        shares_outputs: whether others may read pages with tokens that it generated, not only those of its prompt.
        publishes: whether it still adds to the cache.
        owner: marks pages in the cache that only it may find, once there are any.
        hashes: of its full pages, as far as they were needed.
        cut_names: of the pages that its one eviction leaves, which others with the same policy and tokens may read.
        num_published: leading pages of its own that are cached.
        num_cached: tokens that it took from the cache when it started.
        looked_below: whether the tiers below the device were asked for its pages.
        past: the conversation that it continues, and `saved_row` what its row is to start from, if anything.
        awaits: hash of a page that a running sequence is about to publish and it wants.
    """

    tokens: list[int]
    max_tokens: int
    order: tuple
    needs_history: bool = False
    eviction: Eviction | None = None
    num_prompt: int = field(init=False)
    num_computed: int = 0
    evict_at: int | None = field(init=False)
    num_groups: int = 1
    shifts: list[int] = field(init=False)
    tables: list[list[int]] = field(init=False)
    row: int = -1
    status: Status = Status.NEW
    root: bytes | None = None
    most_cached: int | None = None
    shares_outputs: bool = False
    publishes: bool = True
    owner: bytes = b""
    hashes: list[bytes] = field(default_factory=list)
    cut_names: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached: int = 0
    looked_below: bool = False
    awaits: bytes | None = None
    past: Conversation | None = None
    saved_row: SavedRow | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.tables = [[] for _ in range(self.num_groups)]
        self.restart()

    def restart(self) -> None:
        """Nothing of it is in the cache (any more)."""
        self.num_computed, self.shifts = 0, [0] * self.num_groups
        self.looked_below = False
        self.num_published, self.num_cached, self.publishes = 0, 0, True
        self.evict_at = self.eviction and self.eviction.at
        self.saved_row = None

    def resume(self, past: Conversation) -> None:
        """It starts from the pages of `past`, which it reads from now, or will once they have come back."""
        self.past, self.saved_row = past, past.row
        self.tables = [[] for _ in self.tables] if past.tables is None else [list(pages) for pages in past.tables]
        self.num_computed = self.num_cached = past.num_computed
        self.shifts, self.evict_at = list(past.shifts), past.evict_at
        self.publishes = past.num_computed == 0  # answers are in its pages, and evictions may have been

    def start_cut(self, pages: list[int]) -> None:
        """It starts from the pages that its one eviction leaves."""
        self.pages = pages
        self.num_computed = self.num_cached = self.evict_at
        self.evicted()
        self.publishes = False

    def evicted(self) -> None:
        """The eviction that was due has run."""
        self.shifts = [self.num_computed - kept for kept in self.eviction.kept]
        interval = self.eviction.interval
        self.evict_at = self.num_computed + interval if interval else None

    @property
    def must_evict(self) -> bool:
        """Whether an eviction has to run before it computes more."""
        return self.num_computed == self.evict_at

    def most_computable(self, count: int) -> int:
        """How many of the next `count` tokens may be computed before the next eviction."""
        return count if self.evict_at is None else min(count, self.evict_at - self.num_computed)

    @property
    def pages(self) -> list[int]:
        """Page ids in the first group."""
        return self.tables[0]

    @pages.setter
    def pages(self, pages: list[int]) -> None:
        self.tables[0] = pages

    @property
    def lengths(self) -> list[int]:
        """By group, tokens in the cache once every dispatched step has run."""
        return [self.num_computed - shift for shift in self.shifts]

    def peak_pages(self, num_tokens: int, page_size: int) -> tuple[int, ...]:
        """By group, the most pages it holds at once until `num_tokens` are computed, from the start or its last cut."""
        if self.eviction:
            return self.eviction.peak_pages(num_tokens, page_size, self.shifts)
        return (-(-num_tokens // page_size),) * self.num_groups

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
    def decodes(self) -> bool:
        """Whether its newest output is all that is left to compute. The prompt is always read in chunks, so that how
        its last token is read depends neither on the chunks nor on the cache."""
        return self.num_uncomputed == 1 and self.num_outputs > 0

    @property
    def num_written(self) -> int:
        """Leading tokens that the host knows and whose keys and values are in pages once every dispatched step has run.

        Not the newest output: a device that sees it end the sequence does not compute it.
        """
        return min(self.num_computed, max(self.num_prompt, self.num_known - 1))

    @property
    def num_known(self) -> int:
        """Leading tokens that the host knows."""
        known = len(self.tokens)
        while self.tokens[known - 1] == PENDING:
            known -= 1
        return known

    @property
    def num_shareable(self) -> int:
        """Leading tokens whose pages others may read: those that it read as a prompt, written and known."""
        return self.num_written if self.shares_outputs else min(self.num_computed, self.num_prompt)

    @property
    def has_pending(self) -> bool:
        return self.tokens[-1] == PENDING

    def resolve(self, at: int, token: int) -> None:
        """Replaces the pending token at index `at` by the one the device sampled."""
        self.tokens[at] = token
