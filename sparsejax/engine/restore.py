"""Brings pages of waiting sequences back from the lower tiers, before they are scheduled."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from sparsejax.engine.sequence import Sequence, Status

if TYPE_CHECKING:
    from sparsejax.engine.prefixes import Prefixes
    from sparsejax.engine.tiers import PageTiers

LOOKAHEAD = 8
"""Waiting sequences whose pages are looked for below at once."""


@dataclass
class _Fetch:
    """Pages on their way to a waiting sequence, which holds the `start` cached pages before them."""

    start: int
    hashes: list[bytes]
    payloads: Future


class Restores:
    """Fetches run beside the steps; a page is loaded at the start of a plan, before any move of the plan itself.

    While pages are on their way, other sequences that want them wait for them as for pages that one is computing.
    """

    def __init__(self, prefixes: Prefixes, tiers: PageTiers):
        self._prefixes = prefixes
        self._tiers = tiers
        self._fetches: dict[Sequence, _Fetch] = {}

    def advance(self, waiting: Iterable[Sequence], num_running: int) -> None:
        """Loads what has arrived and finds room, then looks for what the first waiting sequences lack."""
        for sequence, fetch in list(self._fetches.items()):
            if self._arrive(sequence, fetch, num_running):
                del self._fetches[sequence]
                self._prefixes.withdraw(sequence, fetch.hashes)
                num_running += 1  # it will: what comes after it must not take its room
        for sequence in islice(waiting, LOOKAHEAD):
            if sequence.root is None or sequence.looked_below or self._prefixes.left(sequence) is not None:
                continue
            if not sequence.pages or self._could_go_on(sequence, num_running):
                self._look(sequence)

    def wait(self) -> None:
        """Returns when a fetch is done, at once if there is none."""
        wait([fetch.payloads for fetch in self._fetches.values()], return_when=FIRST_COMPLETED)

    def awaited(self, sequence: Sequence) -> bool:
        """Whether pages are on their way to it."""
        return sequence in self._fetches

    def _could_go_on(self, sequence: Sequence, num_running: int) -> bool:
        """Whether a sequence with pages to start from, full ones, has room for the rest. Before that others may take
        its pages again: what is read from below too early is read in vain."""
        full = sequence.num_computed == len(sequence.pages) * self._prefixes.cache.page_size
        return full and self._has_room(sequence, len(sequence.pages), num_running)

    def _has_room(self, sequence: Sequence, held: int, num_running: int) -> bool:
        """Whether a sequence that holds so many pages could be admitted."""
        missing = sequence.peak_pages(len(sequence.tokens), self._prefixes.cache.page_size)[0] - held
        return not num_running or self._prefixes.allocator.num_free >= missing + num_running

    def _look(self, sequence: Sequence) -> None:
        prefixes = self._prefixes
        wanted = prefixes.wanted(sequence)[len(sequence.pages) :]
        pages = prefixes.cache.match(wanted)
        below = wanted[len(pages) :]
        if not below or prefixes.is_coming(below[0]) or not self._tiers.holds(below[0]):
            return
        sequence.looked_below = True
        count = self._tiers.worthwhile(below)
        if count:
            prefixes.hold(sequence, pages)
            prefixes.announce(sequence, below[:count])
            self._fetches[sequence] = _Fetch(len(sequence.pages), below[:count], self._tiers.fetch(below[:count]))

    def _arrive(self, sequence: Sequence, fetch: _Fetch, num_running: int) -> bool:
        """Whether a fetch is over, be it that nobody wants it any more."""
        if sequence.status is not Status.WAITING or len(sequence.pages) != fetch.start:
            return True  # it ended, or gave the pages before these away
        if not fetch.payloads.done():
            return False
        prefixes, allocator = self._prefixes, self._prefixes.allocator
        if not self._has_room(sequence, fetch.start, num_running):
            return False
        payloads = fetch.payloads.result()
        known = prefixes.cache.match(fetch.hashes[: len(payloads)])
        prefixes.hold(sequence, known)
        payloads = payloads[len(known) :][: allocator.num_free]
        if payloads:
            pages = allocator.allocate(len(payloads))
            self._tiers.load(pages, payloads)
            prefixes.adopt(sequence, pages)
        return True
