"""Sequences and the prefix cache: what a sequence starts from, whom it waits for, and what it leaves to others."""

from __future__ import annotations

from secrets import token_bytes

from sparsejax.cache.allocator import PageAllocator
from sparsejax.cache.prefix import PrefixCache
from sparsejax.engine.sequence import Sequence


class Prefixes:
    """Shares cached pages among sequences.

    A page is published when the step that fills it was planned: steps run in the order they are dispatched, so who
    reads the page later finds it filled. A sequence that wants pages which a running one is about to fill waits, so
    each prefix is computed once however many begin with it at the same time.

    Args:
        copies: a page that is shared in part may be copied; otherwise whole pages are shared only.
    """

    def __init__(self, cache: PrefixCache, allocator: PageAllocator, copies: bool):
        self.cache = cache
        self.allocator = allocator
        self._copies = copies
        self._coming: dict[bytes, Sequence] = {}

    def attach(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence the cached pages that it begins with. False: better ones are about to come."""
        if sequence.root is None or sequence.pages:
            return True
        left = self.left(sequence)
        if left:
            self.allocator.share(left)
            sequence.start_cut(left)
            return True
        if left is not None:
            return False
        if sequence.awaits in self._coming:
            return False
        wanted = self.wanted(sequence)
        pages = self.cache.match(wanted)
        sequence.awaits = None
        for hash in wanted[len(pages) :]:
            if hash not in self._coming:
                break
            sequence.awaits = hash
        if sequence.awaits is not None:
            return False
        self.hold(sequence, pages)
        if self._copies:
            parent = sequence.hashes[len(pages) - 1] if pages else sequence.root
            page, count = self.cache.partial(parent, sequence.tokens[sequence.num_computed : self._most(sequence)])
            if count:
                self.allocator.share([page])
                sequence.pages.append(page)
                sequence.num_computed += count
                sequence.num_cached = sequence.num_computed
        return True

    def left(self, sequence: Sequence) -> list[int] | None:
        """The pages that the eviction of a waiting sequence would leave; none of them while another one is about to
        publish them, and None where nobody has them."""
        pages, names = self.cache.match(sequence.cut_names), sequence.cut_names
        if names and len(pages) == len(names):
            return pages
        return [] if names and self.is_coming(names[0]) else None

    def wanted(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the full pages that a sequence may start from."""
        self.cache.extend(sequence.root, sequence.hashes, sequence.tokens[: sequence.num_prompt])
        return sequence.hashes[: self._most(sequence) // self.cache.page_size]

    def _most(self, sequence: Sequence) -> int:
        """Leading tokens that a sequence may take from the cache."""
        most = len(sequence.tokens) - 1
        return most if sequence.most_cached is None else max(min(most, sequence.most_cached), 0)

    def hold(self, sequence: Sequence, pages: list[int]) -> None:
        """Gives a waiting sequence the next `pages`, which are cached, to start from."""
        self.allocator.share(pages)
        self._start_from(sequence, pages)

    def adopt(self, sequence: Sequence, pages: list[int]) -> None:
        """As `hold`, of pages that the sequence alone has and that are cached from now."""
        size = self.cache.page_size
        for index, page in enumerate(pages, len(sequence.pages)):
            parent = sequence.hashes[index - 1] if index else sequence.root
            tokens = sequence.tokens[index * size : (index + 1) * size]
            owned = bool(sequence.owner) and (index + 1) * size > sequence.num_prompt
            self.cache.insert(parent, sequence.hashes[index], tokens, page, owned)
        self._start_from(sequence, pages)

    def _start_from(self, sequence: Sequence, pages: list[int]) -> None:
        sequence.pages = [*sequence.pages, *pages]
        sequence.num_published = len(sequence.pages)
        sequence.num_computed = len(sequence.pages) * self.cache.page_size
        sequence.num_cached = sequence.num_computed

    def is_coming(self, hash: bytes) -> bool:
        """Whether a page will soon be cached."""
        return hash in self._coming

    def announce(self, sequence: Sequence, hashes: list[bytes]) -> None:
        """Pages that `sequence` is about to publish: others wait for them."""
        for hash in hashes:
            self._coming.setdefault(hash, sequence)

    def withdraw(self, sequence: Sequence, hashes: list[bytes]) -> None:
        """Nobody needs to wait any longer for what `sequence` has announced of `hashes`."""
        for hash in hashes:
            if self._coming.get(hash) is sequence:
                del self._coming[hash]

    def started(self, sequence: Sequence) -> None:
        """Announces the pages that a sequence which starts to run will publish."""
        if sequence.root is None or not sequence.publishes:
            return
        self.announce(sequence, sequence.cut_names[:1])
        soon = sequence.num_computed + sequence.most_computable(sequence.num_uncomputed)
        full = min(soon, sequence.num_prompt) // self.cache.page_size
        self.announce(sequence, sequence.hashes[sequence.num_published : full])

    def publish(self, sequence: Sequence) -> None:
        """Caches the shareable pages that a sequence has filled since."""
        if sequence.num_computed // self.cache.page_size > sequence.num_published:
            self._add(sequence, sequence.num_shareable)

    def publish_cut(self, sequence: Sequence) -> None:
        """Caches what an eviction has just left, where it depends on nothing but policy and tokens."""
        for name, page in zip(sequence.cut_names, sequence.pages, strict=False):
            self.cache.insert(sequence.root, name, (), page, owned=True)

    def keep(self, sequence: Sequence) -> None:
        """Caches all full pages of a sequence that gives its row back: it goes on from them, with the very same bits.

        Pages with tokens that it generated are found by no other.
        """
        sequence.owner = sequence.owner or token_bytes(16)
        self._add(sequence, sequence.num_shareable)
        self._add(sequence, sequence.num_written, sequence.owner)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """`child` has taken over the leading pages of `parent`, and may publish what comes after them."""
        child.num_published = min(parent.num_published, child.num_computed // self.cache.page_size)
        child.hashes = parent.hashes[: child.num_published]

    def stop(self, sequence: Sequence) -> None:
        """A sequence publishes nothing more: its pages are about to go, or hold other tokens than their number says."""
        sequence.publishes = False
        self.withdraw(sequence, [*sequence.hashes[sequence.num_published :], *sequence.cut_names[:1]])

    def _add(self, sequence: Sequence, num_tokens: int, owner: bytes = b"") -> None:
        size = self.cache.page_size
        full = num_tokens // size
        if sequence.root is None or not sequence.publishes or full <= sequence.num_published:
            return
        self.cache.extend(sequence.root, sequence.hashes, sequence.tokens[: full * size], owner)
        for index in range(sequence.num_published, full):
            parent, hash = (sequence.hashes[index - 1] if index else sequence.root), sequence.hashes[index]
            tokens = sequence.tokens[index * size : (index + 1) * size]
            if not self.cache.insert(parent, hash, tokens, sequence.pages[index], owned=bool(owner)):
                self.stop(sequence)  # later pages would hang on one that it does not read
                return
            sequence.num_published += 1
            self.withdraw(sequence, [hash])
