"""Brings pages of waiting sequences back from the lower tiers, before they are scheduled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sparsejax.cache.tiers.host import Payload
from sparsejax.engine.sequence import Sequence, Status

if TYPE_CHECKING:
    from sparsejax.engine.prefixes import Prefixes
    from sparsejax.engine.tiers import PageTiers

LOOKAHEAD = 8
"""Waiting sequences whose pages are looked for below at once."""


@dataclass
class _Fetch:
    """Pages on their way to a waiting sequence.

    Attributes:
        start: pages before them, which the sequence holds.
        wanted: free pages with which it is admitted.
        announced: pages that others wait for meanwhile.
        place: gives the sequence what has arrived.
    """

    start: int
    hashes: list[bytes]
    payloads: Future[list[Payload]]
    wanted: int
    announced: list[bytes]
    place: Callable[[Sequence, _Fetch, list[Payload]], None]


class Restores:
    """Fetches run beside the steps; a page is loaded at the start of a plan, before any move of the plan itself.

    While pages are on their way, other sequences that want them wait for them as for pages that one is computing.
    """

    def __init__(self, prefixes: Prefixes, tiers: PageTiers, give_way: Callable[[list[int]], bool]):
        """`give_way`: makes those who only keep pages give up some, so that so many are free; False if they cannot."""
        self._prefixes = prefixes
        self._tiers = tiers
        self._give_way = give_way
        self._fetches: dict[Sequence, _Fetch] = {}

    def advance(self, waiting: Iterable[Sequence], num_running: int) -> None:
        """Loads what has arrived and finds room, then looks for what the first waiting sequences lack."""
        for sequence, fetch in list(self._fetches.items()):
            if self._arrive(sequence, fetch, num_running):
                del self._fetches[sequence]
                self._prefixes.withdraw(sequence, fetch.announced)
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
        return full and (not num_running or self._prefixes.allocator.num_free >= self._missing(sequence) + num_running)

    def _missing(self, sequence: Sequence) -> int:
        """Pages that a sequence lacks to be admitted."""
        return sequence.peak_pages(len(sequence.tokens), self._prefixes.cache.page_size)[0] - len(sequence.pages)

    def bring(self, sequence: Sequence, names: list[bytes]) -> None:
        """Starts to read the pages of the conversation that a new sequence continues, all of them or none."""
        sequence.looked_below = True
        fetched = self._tiers.fetch(names)
        self._fetches[sequence] = _Fetch(0, names, fetched, self._missing(sequence), [], self._place_conversation)

    def _look(self, sequence: Sequence) -> None:
        prefixes = self._prefixes
        if sequence.cut_names and not sequence.pages and self._look_for_cut(sequence):
            return
        wanted = prefixes.wanted(sequence)[len(sequence.pages) :]
        pages = prefixes.cache.match(wanted)
        below = wanted[len(pages) :]
        if not below or prefixes.is_coming(below[0]) or not self._tiers.holds(below[0]):
            return
        sequence.looked_below = True
        count = self._tiers.worthwhile(below)
        if count:
            prefixes.hold(sequence, pages)
            self._fetch(sequence, below[:count], self._missing(sequence), below[:count], self._place_prefix)

    def _look_for_cut(self, sequence: Sequence) -> bool:
        """Whether what its eviction would leave comes from below, as far as it is not on the device."""
        names = sequence.cut_names
        below = names[len(self._prefixes.cache.match(names)) :]
        if not all(map(self._tiers.holds, below)) or self._tiers.worthwhile(below) < len(below):
            return False
        sequence.looked_below = True
        self._fetch(sequence, below, len(names) + 1, names[:1], self._place_cut)
        return True

    def _fetch(self, sequence: Sequence, hashes: list[bytes], wanted: int, announced: list[bytes], place: Any) -> None:
        self._prefixes.announce(sequence, announced)
        fetched = self._tiers.fetch(hashes)
        self._fetches[sequence] = _Fetch(len(sequence.pages), hashes, fetched, wanted, announced, place)

    def _arrive(self, sequence: Sequence, fetch: _Fetch, num_running: int) -> bool:
        """Whether a fetch is over, be it that nobody wants it any more."""
        if sequence.status is not Status.WAITING or len(sequence.pages) != fetch.start:
            return True  # it ended, or gave the pages before these away
        if not fetch.payloads.done():
            return False
        allocator = self._prefixes.allocator
        for wanted in (fetch.wanted + num_running, len(fetch.hashes)):
            while allocator.num_free < wanted and self._give_way([wanted]):
                pass
        if num_running and allocator.num_free < fetch.wanted + num_running:
            return False
        fetch.place(sequence, fetch, fetch.payloads.result())
        return True

    def _place_prefix(self, sequence: Sequence, fetch: _Fetch, payloads: list[Payload]) -> None:
        """What there is room for goes to the cache."""
        known = self._prefixes.cache.match(fetch.hashes[: len(payloads)])
        self._prefixes.hold(sequence, known)
        pages = self._loaded(payloads[len(known) :][: self._prefixes.allocator.num_free])
        self._prefixes.adopt(sequence, pages)

    def _place_cut(self, sequence: Sequence, fetch: _Fetch, payloads: list[Payload]) -> None:
        """It starts from them, and others may; its prompt is read if one is missing."""
        if self._gather(sequence, sequence.cut_names, fetch, payloads):
            self._prefixes.publish_cut(sequence)
            sequence.start_cut(sequence.pages)

    def _place_conversation(self, sequence: Sequence, fetch: _Fetch, payloads: list[Payload]) -> None:
        """It goes on from them; all that was said is read anew if one is missing."""
        if not self._gather(sequence, fetch.hashes, fetch, payloads):
            sequence.restart()

    def _gather(self, sequence: Sequence, names: list[bytes], fetch: _Fetch, payloads: list[Payload]) -> bool:
        """Gives a sequence pages that are cached and after them new ones, which hold what has arrived. False if one is
        missing, or room for it."""
        allocator, known = self._prefixes.allocator, self._prefixes.cache.match(names)
        arrived = dict(zip(fetch.hashes, payloads, strict=False))
        new = [arrived[name] for name in names[len(known) :] if name in arrived]
        allocator.share(known)
        if len(known) + len(new) < len(names) or allocator.num_free < len(new):
            allocator.release(known)
            return False
        sequence.pages = [*known, *self._loaded(new)]
        return True

    def _loaded(self, payloads: list[Payload]) -> list[int]:
        """New pages with what has arrived."""
        pages = self._prefixes.allocator.allocate(len(payloads))
        if pages:
            self._tiers.load(pages, payloads)
        return pages
