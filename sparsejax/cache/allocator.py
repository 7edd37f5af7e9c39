"""Reference-counted pages on the host: which pages are free, and how many sequences read each one."""

from __future__ import annotations

import numpy as np

from sparsejax.errors import CapacityError

DUMP_PAGE = 0


class PageAllocator:
    """Hands out page ids ``1 .. num_pages - 1``; page 0 absorbs the writes of padding tokens.

    Pages are reference-counted so that sequences can share a prefix. A page with more than one reader must
    not be written: the writer takes a copy first (`is_shared`).
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._references = np.zeros(num_pages, np.int32)
        # Last in, first out: a page that was just freed is the one most likely still in a cache.
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def capacity(self) -> int:
        """Pages that can ever be handed out."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_live(self) -> int:
        return self.capacity - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one reader.

        Raises:
            CapacityError: fewer pages are free; nothing is taken then.
        """
        if count > len(self._free):
            raise CapacityError(f"{count} pages wanted, {len(self._free)} of {self.capacity} are free.")
        pages = [self._free.pop() for _ in range(count)]
        self._references[pages] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """Adds one reader to each of `pages`, which must be live."""
        for page in pages:
            self._require_live(page)
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """Takes one reader from each of `pages`; those without readers become free."""
        for page in pages:
            self._require_live(page)
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        return bool(self._references[page] > 1)

    def references(self, page: int) -> int:
        return int(self._references[page])

    def _require_live(self, page: int) -> None:
        if not 0 < page < self.num_pages or self._references[page] == 0:
            raise CapacityError(f"page {page} is not live: it was freed twice or never handed out.")
