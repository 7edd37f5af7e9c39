"""Conversations: what finished sequences have in the cache, kept for the next turn that goes on from there."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace
from secrets import token_bytes, token_hex
from typing import TYPE_CHECKING, Any

from sparsejax.cache.allocator import PageAllocator
from sparsejax.cache.prefix import HASH_BYTES, PrefixCache
from sparsejax.engine.conversation import Conversation
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.prompts import Prompt
from sparsejax.engine.sequence import Sequence
from sparsejax.engine.validate import reject
from sparsejax.errors import ConversationError

if TYPE_CHECKING:
    from sparsejax.engine.saved_row import SavedRow
    from sparsejax.engine.tiers import PageTiers

MOST_GONE = 1000
"""Conversations that are gone of which it is known why."""
EXPIRED = "nobody continued it within its keep_alive"
DECIDED = "Its first turn has decided that."


class Conversations:
    """Keeps at most `max_pages` pages of all groups, the conversation that was used last longest ago goes first.

    What gives way goes to the tiers below, if there are any, and comes back with the next turn.

    Args:
        whole_pages: open pages are not in the pools: full ones are kept, and `Conversation.row` where there is one.
        clock: seconds; `Conversation.until` is read off it.
    """

    def __init__(
        self,
        allocators: tuple[PageAllocator, ...],
        page_size: int,
        whole_pages: bool,
        max_pages: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        cache: PrefixCache | None = None,
        tiers: PageTiers | None = None,
    ):
        self.max_pages = sum(each.capacity for each in allocators) // 2 if max_pages is None else max_pages
        self.num_pages = 0
        self.counters: Counter[str] = Counter()
        self.clock = clock
        self._cache, self._tiers = cache, tiers
        self._allocators, self._page_size, self._whole_pages = allocators, page_size, whole_pages
        self._kept: OrderedDict[tuple[str | None, str], Conversation] = OrderedDict()
        self._gone: OrderedDict[tuple[str | None, str], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self):
        return iter(self._kept.values())

    @property
    def row_bytes(self) -> int:
        """Bytes that are kept besides pages."""
        return sum(getattr(each.row, "nbytes", 0) for each in list(self))

    def of(self, params: SamplingParams) -> Conversation:
        """The conversation that a request continues. Changes nothing, so it may run beside the steps.

        Raises:
            ConversationError: it is gone, or another request continues it.
        """
        key = params.cache_salt, params.conversation
        found = self._kept.get(key)
        if found is not None and found.busy:
            raise ConversationError(
                f"conversation {key[1]!r} is being continued by another request: wait for its end, one turn follows "
                "the other.",
                parameter="conversation",
                value=key[1],
                code="conversation_busy",
            )
        why = ""
        if found is None:
            why = self._gone.get(key, "it was never kept here, or is gone for long")
        elif found.until <= self.clock():
            why = EXPIRED
        elif found.below and not all(map(self._tiers.holds, found.below)):
            why = "main memory and disk have no room for its pages any more"
        if why:
            raise ConversationError(
                f"conversation {key[1]!r} is not kept: {why}. Leave conversation out to have all of it computed.",
                parameter="conversation",
                value=key[1],
                code="conversation_gone",
            )
        return found

    def continued(
        self, prompt: Prompt, params: SamplingParams
    ) -> tuple[Prompt, SamplingParams, Conversation | None]:
        """Prompt and parameters of a request under the policy of the conversation that it continues, if it does.

        Raises:
            ConversationError: as `of`, or the tokens are none of its next turns.
            RequestError: the request asks for another policy.
        """
        if params.conversation is None:
            return prompt, params, None
        past = self.of(params)
        past.extended_by(prompt)
        if prompt.compress_at is not None:
            reject("compress_at", prompt.compress_at, "left out beside conversation", DECIDED)
        if params.sparsity not in (None, past.sparsity):
            reject("sparsity", params.sparsity, "left out beside conversation", DECIDED)
        return replace(prompt, compress_at=past.compress_at), replace(params, sparsity=past.sparsity), past

    def begin(self, past: Conversation, sequence: Sequence) -> None:
        """`sequence`, new and not queued, goes on from `past`."""
        for allocator, pages in zip(self._allocators, past.tables or ((),) * len(self._allocators), strict=True):
            allocator.share(pages)
        sequence.resume(past)
        past.busy = True
        self._kept.move_to_end(past.key)
        if past.counted:
            self._give_up(past, "the request that continued it was aborted")
        self.counters["continued"] += 1

    def keep(self, sequence: Sequence, params: SamplingParams, row: SavedRow | None, **facts: Any) -> str | None:
        """Keeps a finished sequence that has its pages still, in place of the conversation that it continued.

        Args:
            facts: `text`, `compress_at` and `counted` of the `Conversation`.

        Returns:
            its name; None if it has more than `max_pages` pages.
        """
        tokens = sequence.tokens[: sequence.num_known]
        size, count = self._page_size, sequence.num_written
        if self._whole_pages and row is None:
            count -= count % size
        lengths = [count - shift for shift in sequence.shifts]
        held = [length // size if self._whole_pages else -(-length // size) for length in lengths]
        tables = [pages[:number] for pages, number in zip(sequence.tables, held, strict=True)]
        past = sequence.past
        new = Conversation(
            (params.cache_salt, token_hex(16)) if past is None else past.key, tokens, sequence.num_prompt,
            sparsity=params.sparsity, tables=tables, row=row, num_computed=count, shifts=list(sequence.shifts),
            evict_at=sequence.evict_at, until=self.clock() + params.keep_alive, **facts,
        )  # fmt: skip
        if new.num_pages > self.max_pages:
            self.leave(sequence, ended=True)
            return None
        for allocator, pages in zip(self._allocators, tables, strict=True):
            allocator.share(pages)
        if past is not None:
            self._remove(past)
        while self.num_pages + new.num_pages > self.max_pages:
            first = min((each for each in self._by_use() if each.num_pages), key=lambda each: each.tables is None)
            self._move_out(first, "newer ones took its pages (conversation_pages)")
        self._kept[new.key] = new
        self.num_pages += new.num_pages
        self.counters["kept"] += 1
        return new.key[1]

    def leave(self, sequence: Sequence, ended: bool) -> None:
        """A sequence is over and not kept. What it continued stays as it was if it was aborted before it `ended`."""
        past = sequence.past
        if past is None:
            return
        past.busy = False
        if ended:
            self._remove(past, "its last turn was not kept")
        elif past.lost:
            self._remove(past, past.lost)

    def expire(self) -> None:
        """Gives up what nobody continued in time, and settles rows that have arrived on the host."""
        now = self.clock()
        for each in list(self):
            if each.row is not None:
                each.row.settle()
            if each.until <= now and not each.busy:
                self._drop(each, EXPIRED)

    def give_way(self, wanted: list[int] | None = None, *, unshare: bool = False) -> bool:
        """Gives up the pages of one conversation for others; those that nobody continues come first.

        Args:
            wanted: free pages by cache group; nothing is given up if all conversations together would not do.
            unshare: also give up pages that others read: whoever writes to one of them then needs no copy.

        Returns:
            whether one was given up.
        """
        held = [each for each in self._by_use() if each.tables is not None]
        if wanted is not None:
            for group, (allocator, count) in enumerate(zip(self._allocators, wanted, strict=True)):
                pages = [page for each in held for page in each.tables[group]]
                if allocator.num_free + allocator.num_freed_by(pages) < count:
                    return False
        for each in held:
            if unshare or any(a.num_freed_by(p) for a, p in zip(self._allocators, each.tables, strict=True)):
                self._move_out(each, "running requests needed its pages")
                return True
        return False

    def close(self) -> None:
        """Ends all of them."""
        for each in list(self):
            self._remove(each, "the engine has stopped")

    def _by_use(self) -> list[Conversation]:
        """All, in the order in which they give up their pages."""
        return sorted(self, key=lambda each: each.busy)

    def _move_out(self, each: Conversation, why: str) -> None:
        """Takes a conversation off the device: its pages go below if they can, or it is given up."""
        room = 0 if self._tiers is None or each.counted or each.tables is None else self._tiers.num_pages
        pages = each.tables[0] if room else []
        if not 0 < len(pages) <= room:
            self._drop(each, why)
            return
        lowered = [one for one in self if one.below]
        while len(pages) + sum(len(one.below) for one in lowered) > room:
            self._drop(lowered.pop(0), "newer ones took its room in main memory and on the disk")
        names = [self._cache.name_of(page) for page in pages]
        each.own = [token_bytes(HASH_BYTES) for name in names if name is None]
        own = iter(each.own)
        each.below = [name or next(own) for name in names]
        self._tiers.write_back(list(zip(each.below, pages, strict=True)))
        self.num_pages -= len(pages)
        self._let_go(each)
        self.counters["lowered"] += 1

    def _drop(self, each: Conversation, why: str) -> None:
        """Gives a conversation up; while a request continues it, its pages only."""
        self.counters["dropped"] += 1
        if each.busy:
            self._give_up(each, why)
        else:
            self._remove(each, why)

    def _remove(self, each: Conversation, why: str = "") -> None:
        """Forgets a conversation; with a reason unless another takes its place."""
        del self._kept[each.key]
        self._give_up(each, why)
        if why:
            self._gone[each.key] = why
            while len(self._gone) > MOST_GONE:
                self._gone.popitem(last=False)

    def _give_up(self, each: Conversation, why: str) -> None:
        if each.lost:
            return
        self.num_pages -= each.num_pages
        self._let_go(each)
        if each.own:
            self._tiers.discard(each.own)
        each.row, each.lost, each.below = None, why, []

    def _let_go(self, each: Conversation) -> None:
        for allocator, pages in zip(self._allocators, each.tables or (), strict=each.tables is not None):
            allocator.release(pages)
        each.tables = None
