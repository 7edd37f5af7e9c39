"""The prefix cache: which sealed pages hold which tokens, so that a sequence starts from those that it shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile

import numpy as np

from sparsejax.cache.allocator import PageAllocator

HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class CachedPage:
    """A full page: its tokens, and by `parent`, the hash of the page before it, all tokens that lead to it."""

    hash: bytes
    parent: bytes
    tokens: tuple[int, ...]
    page: int


class PrefixCache:
    """A radix tree of pages. Each names its whole prefix by a chain of hashes, so a path is found one page at a time.

    The cache is one more reader of each of its pages. Pages that nobody else reads are idle: `PageAllocator` takes
    them when it runs short, the one that became idle first, which is always a leaf: whoever reads a page reads those
    that lead to it, and releases them after it. Pages are pinned by whoever shares them with the allocator.

    Attributes:
        on_evict: told hash and id of each page that is about to leave, while it still holds what it holds.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, fingerprint: str = ""):
        """`fingerprint` stands for all that decides what a page of given tokens holds: weights, dtype, codec."""
        self.page_size = page_size
        self.on_evict: Callable[[list[tuple[bytes, int]]], None] = lambda evicted: None
        self._fingerprint = fingerprint
        self._pages: dict[bytes, CachedPage] = {}
        self._hashes: dict[int, bytes] = {}
        # By parent and first token: what a partial hit looks through, and no more.
        self._children: dict[tuple[bytes, int], dict[bytes, CachedPage]] = {}
        allocator.on_take = self._forget
        self._allocator = allocator

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[CachedPage]:
        return iter(self._pages.values())

    def root(self, salt: str | None = None) -> bytes:
        """Where the chains of requests with this salt begin; those of other salts never meet them."""
        facts = (self._fingerprint, self.page_size, salt)
        return blake2b(repr(facts).encode(), digest_size=HASH_BYTES).digest()

    def extend(self, root: bytes, hashes: list[bytes], tokens: Sequence[int], owner: bytes = b"") -> None:
        """Brings `hashes` up to the full pages of `tokens`, whose first ``len(hashes)`` pages it has.

        Pages of an `owner` are found by nobody else: other pages may hold the same tokens and not the same bits.
        """
        size = self.page_size
        for start in range(len(hashes) * size, len(tokens) - size + 1, size):
            content = np.array(tokens[start : start + size], np.int32).tobytes()
            parent = hashes[-1] if hashes else root
            hashes.append(blake2b(parent + content + owner, digest_size=HASH_BYTES).digest())

    def names(self, root: bytes, tokens: Sequence[int], rule: str, count: int) -> list[bytes]:
        """Names for `count` pages that `rule` made of `tokens` and nothing else: pages of prompts have others."""
        made = blake2b(root + np.array(tokens, np.int32).tobytes() + rule.encode(), digest_size=HASH_BYTES)
        return [blake2b(made.digest() + index.to_bytes(8), digest_size=HASH_BYTES).digest() for index in range(count)]

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Ids of the leading pages that are cached. They may be taken until the caller shares them."""
        return [page.page for page in takewhile(bool, map(self._pages.get, hashes))]

    def name_of(self, page: int) -> bytes | None:
        """The hash of a page, if it is cached."""
        return self._hashes.get(page)

    def partial(self, parent: bytes, tokens: Sequence[int]) -> tuple[int, int]:
        """The page after `parent` that begins with the most of `tokens`, and how many; (0, 0) if none does."""
        candidates = self._children.get((parent, tokens[0]), {}) if tokens else {}
        found = ((_common(child.tokens, tokens), child.page) for child in candidates.values())
        return max(found, default=(0, 0))[::-1]

    def insert(self, parent: bytes, hash: bytes, tokens: Sequence[int], page: int, owned: bool = False) -> bool:
        """Caches a full page after `parent`, the root or a cached page that the caller reads too.

        An `owned` page is no partial hit of anybody; it may come without `tokens`.

        Returns:
            False if another page holds this already; nothing changes then.
        """
        if hash in self._pages:
            return False
        self._allocator.cache(page)
        cached = CachedPage(hash, parent, tuple(tokens), page)
        self._pages[hash], self._hashes[page] = cached, hash
        if not owned:
            self._children.setdefault((parent, tokens[0]), {})[hash] = cached
        return True

    def _forget(self, pages: list[int]) -> None:
        leaving = [self._pages.pop(self._hashes.pop(page)) for page in pages]
        self.on_evict([(cached.hash, cached.page) for cached in leaving])
        for cached in leaving:
            place = cached.parent, *cached.tokens[:1]
            siblings = self._children.get(place, {})
            siblings.pop(cached.hash, None)
            if not siblings:
                self._children.pop(place, None)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens that both have."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
