"""Reference-counted pages on the host: which pages are free, and how many sequences read each one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from sparsejax.errors import CapacityError

DUMP_PAGE = 0


class PageAllocator:
    """Hands out page ids ``1 .. num_pages - 1``; page 0 absorbs the writes of padding tokens.

    Pages are reference-counted so that sequences can share a prefix. A page with more than one reader must
    not be written: the writer takes a copy first (`is_shared`).

    A cached page has the cache as one more reader. Once it is the only one the page is idle: it counts as free, and
    is taken when no other page is left, the one that became idle first.

    Attributes:
        on_take: told which idle pages are about to be taken, while they still hold what they hold.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.on_take: Callable[[list[int]], None] = lambda pages: None
        self._references = np.zeros(num_pages, np.int32)
        self._cached = np.zeros(num_pages, bool)
        # Last in, first out: a page that was just freed is the one most likely still in a cache.
        self._free = list(range(num_pages - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def capacity(self) -> int:
        """Pages that can ever be handed out."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_live(self) -> int:
        return self.capacity - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one reader.

        Raises:
            CapacityError: fewer pages are free; nothing is taken then.
        """
        if count > self.num_free:
            raise CapacityError(f"{count} pages wanted, {self.num_free} of {self.capacity} are free.")
        self._take_idle(count - len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        self._references[pages] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Adds one reader to each of `pages`, which must be live or idle."""
        for page in pages:
            self._require_held(page)
            self._references[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: list[int]) -> None:
        """Takes one reader from each of `pages`, the last page first; those without readers become free.

        So of a sequence's cached pages a later one is always idle before those that lead to it.
        """
        for page in reversed(pages):
            self._require_held(page)
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)
            elif self._references[page] == 1 and self._cached[page]:
                self._idle[page] = None

    def cache(self, page: int) -> None:
        """Makes the cache a reader of a page that somebody else reads too."""
        self._require_held(page)
        self._references[page] += 1
        self._cached[page] = True

    def is_shared(self, page: int) -> bool:
        return bool(self._references[page] > 1)

    def references(self, page: int) -> int:
        """Readers of a page, the cache included."""
        return int(self._references[page])

    def num_freed_by(self, pages: list[int]) -> int:
        """How many pages would be free if a reader of each of `pages` let go; a page may be listed several times."""
        ids, readers = np.unique(np.array(pages, np.int64), return_counts=True)
        return int((self._references[ids] - self._cached[ids] == readers).sum())

    def _take_idle(self, count: int) -> None:
        if count <= 0:
            return
        pages = [page for page, _ in zip(self._idle, range(count), strict=False)]
        self.on_take(pages)
        for page in pages:
            del self._idle[page]
        self._references[pages] = 0
        self._cached[pages] = False
        self._free += reversed(pages)

    def _require_held(self, page: int) -> None:
        if not 0 < page < self.num_pages or self._references[page] == 0:
            raise CapacityError(f"page {page} is not live: it was freed twice or never handed out.")
