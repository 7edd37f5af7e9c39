"""Continuous batching on the host: which tokens of which sequences the next step computes.

One rule covers everything: a running sequence has `num_uncomputed` tokens to compute. Exactly one is a decode
row; more is a prefill chunk, cut to the step's token budget. Decode rows go first, then chunks in order, then
the queue is admitted while rows, pages and budget last. A new sequence starts from the pages that the prefix
cache has of it. When pages run out the last sequence in order gives its pages back and is computed again later.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsejax.cache.allocator import PageAllocator
from sparsejax.cache.prefix import PrefixCache
from sparsejax.engine.conversation import Conversation
from sparsejax.engine.conversations import Conversations
from sparsejax.engine.plan import Chunk, Cut, StepPlan
from sparsejax.engine.prefixes import Prefixes
from sparsejax.engine.restore import Restores
from sparsejax.engine.sequence import PENDING, Sequence, Status

if TYPE_CHECKING:
    from sparsejax.engine.tiers import PageTiers


@dataclass(frozen=True)
class Limits:
    """What the compiled steps can hold. Tokens and rows.

    Attributes:
        share_whole_pages: sequences share full pages only, because open pages are not in the pool.
        conversation_pages: pages that conversations keep between their turns; None is half of all.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk: int
    page_size: int
    num_decode_steps: int = 1
    share_whole_pages: bool = False
    conversation_pages: int | None = None


class Scheduler:
    """Owns the queue, the rows and the page lists; decides, and never touches the device.

    Each cache group has an allocator. A sequence takes pages in all of them or in none.
    """

    def __init__(
        self,
        limits: Limits,
        allocators: tuple[PageAllocator, ...],
        cache: PrefixCache,
        tiers: PageTiers | None = None,
    ):
        self.limits = limits
        self.allocators = allocators
        self.prefixes = Prefixes(cache, self.allocator, copies=not limits.share_whole_pages)
        kept = limits.share_whole_pages, limits.conversation_pages
        self.conversations = Conversations(allocators, limits.page_size, *kept, cache=cache, tiers=tiers)
        self.restores = Restores(self.prefixes, tiers, self.conversations.give_way) if tiers else None
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))

    @property
    def allocator(self) -> PageAllocator:
        """Of the first group, whose pages the prefix cache shares."""
        return self.allocators[0]

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        bisect.insort(self.waiting, sequence, key=_order)

    def resume(self, past: Conversation, sequence: Sequence) -> None:
        """`sequence`, new and not queued, goes on from `past`, whose pages come back if they are below."""
        self.conversations.begin(past, sequence)
        if past.below:
            self.restores.bring(sequence, past.below)

    def fork(self, parent: Sequence, children: Iterable[Sequence]) -> None:
        """Queues `children`, which continue the parent's prompt and read its pages until they write.

        The last prompt token is left out: a child computes it again for its own first logits; where only whole
        pages are shared, with the tokens before it in its page.
        """
        shared = parent.num_prompt - 1
        if self.limits.share_whole_pages:
            shared -= shared % self.limits.page_size
        tables = [pages[: _pages(shared, self.limits.page_size)] for pages in parent.tables]
        for child in children:
            for allocator, pages in zip(self.allocators, tables, strict=True):
                allocator.share(pages)
            child.tables = [list(pages) for pages in tables]
            child.num_computed = shared
            self.prefixes.fork(parent, child)
            self.add(child)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, in any state. Its pages are free at once: steps run in the order they were
        dispatched, so a step still in flight writes before any later owner does."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = Status.FINISHED

    def schedule(self) -> StepPlan | None:
        """Plans the next step. None: nothing to do until results of dispatched steps come in."""
        self.conversations.expire()
        if self.restores:
            self.restores.advance(self.waiting, len(self.running))
        plan = StepPlan()
        if self._plan_evictions(plan) and self._plan_running(plan):
            self._admit(plan)
        if not (plan.decode or plan.chunks or plan.evictions or plan.admitted):
            return None
        plan.num_steps = self._decode_steps(plan)
        self._commit(plan)
        return plan

    def _plan_evictions(self, plan: StepPlan) -> bool:
        """Cuts the caches that are due, in order; False if pages ran out.

        What stays moves to new pages; the old ones are free at once.
        """
        for sequence in list(self.running):
            if not sequence.must_evict or sequence.num_remaining <= 0 or sequence.status is not Status.RUNNING:
                continue  # not due, at its end, or preempted for an earlier one just now
            counts = [_pages(kept, self.limits.page_size) for kept in sequence.eviction.kept]
            if not self._free_up(counts, sequence):
                return False
            self.prefixes.publish(sequence)
            self.prefixes.stop(sequence)
            new = [allocator.allocate(count) for allocator, count in zip(self.allocators, counts, strict=True)]
            self._give_back(sequence)
            sequence.tables = new
            its = sequence.eviction.kept, sequence.num_computed, [pages[:] for pages in new]
            plan.evictions.append(Cut(sequence.row, sequence.lengths, *its))
            plan.enter(sequence)
            sequence.evicted()
            self.prefixes.publish_cut(sequence)
        return True

    def _plan_running(self, plan: StepPlan) -> bool:
        """Adds the running sequences in order; False if pages ran out, so that nobody may be admitted."""
        ready = [s for s in self.running if s.num_remaining > 0 and not (s.needs_history and s.has_pending)]
        budget = self._chunk_budget(sum(s.decodes for s in ready))
        for sequence in ready:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for an earlier one just now
            count = sequence.most_computable(min(sequence.num_uncomputed, max(budget, 1)))
            if not sequence.decodes and budget <= 0:
                continue
            if not self._reserve(sequence, sequence.num_computed + count, plan):
                return False
            if sequence.decodes:
                plan.decode.append(sequence)
            else:
                plan.chunks.append(_chunk(sequence, count))
                budget -= count
        return True

    def _admit(self, plan: StepPlan) -> None:
        decoding = len(plan.decode)
        budget = self._chunk_budget(decoding) - sum(chunk.count for chunk in plan.chunks)
        at = 0
        while at < len(self.waiting) and self._free_rows and budget > 0:
            sequence = self.waiting[at]
            if (self.restores and self.restores.awaited(sequence)) or not self.prefixes.attach(sequence):
                at += 1
                continue
            if not self._room_for(sequence):
                return
            del self.waiting[at]
            self._start(sequence, plan)
            if sequence.must_evict:  # due since the turn before; the next plan begins with it
                continue
            count = sequence.most_computable(min(sequence.num_uncomputed, budget))
            # Cannot fail: `_room_for` counted these pages.
            most = sequence.most_computable(sequence.num_uncomputed)
            self._reserve(sequence, sequence.num_computed + most, plan)
            if sequence.decodes:
                plan.decode.append(sequence)
            else:
                plan.chunks.append(_chunk(sequence, count))
            budget -= count

    def _start(self, sequence: Sequence, plan: StepPlan) -> None:
        sequence.row = self._free_rows.pop()
        sequence.status = Status.RUNNING
        bisect.insort(self.running, sequence, key=_order)
        plan.admitted.append(sequence)
        self.prefixes.started(sequence)
        plan.enter(sequence)

    def _room_for(self, sequence: Sequence) -> bool:
        """Whether every known token of `sequence` finds a page, with one page left for each running one, so
        that a sequence is not admitted only to be preempted by its neighbours' next tokens."""
        while not self._free(wanted := self._wanted(sequence)):
            if self.conversations.give_way(wanted):
                continue
            if self.running or not (
                self._reclaim_waiting(after=sequence)
                or self.conversations.give_way(unshare=True)
                or self._drop_copied(sequence)
            ):
                return False
        return True

    def _wanted(self, sequence: Sequence) -> list[int]:
        """By group, free pages with which `sequence` is admitted."""
        peaks = sequence.peak_pages(len(sequence.tokens), self.limits.page_size)
        places = zip(peaks, sequence.tables, self._shared(sequence), strict=True)
        return [peak - len(pages) + len(shared) + len(self.running) for peak, pages, shared in places]

    def _drop_copied(self, sequence: Sequence) -> bool:
        """Gives back the page that `sequence` would have to copy: page and copy may be one more than there are."""
        first = sequence.num_computed // self.limits.page_size
        if len(sequence.pages) <= first or any(sequence.shifts):  # what is left after an eviction is nowhere else
            return False
        for allocator, pages in zip(self.allocators, sequence.tables, strict=True):
            allocator.release(pages[first:])
            del pages[first:]
        sequence.num_computed = first * self.limits.page_size
        sequence.num_cached = min(sequence.num_cached, sequence.num_computed)
        return True

    def _reserve(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> bool:
        """Gives `sequence` its own writable pages for positions ``num_computed .. num_tokens - 1``.

        Takes pages from later sequences if it must. False if it had to give up: it was preempted itself, or
        the victim's results are still on the device.
        """
        size = self.limits.page_size
        while True:
            shared = self._shared(sequence)
            places = zip(sequence.shifts, sequence.tables, strict=True)
            missing = [max(0, _pages(num_tokens - shift, size) - len(pages)) for shift, pages in places]
            if self._free([len(copied) + count for copied, count in zip(shared, missing, strict=True)]):
                break
            if not self._make_room(sequence):
                return False
        for group, (allocator, pages) in enumerate(zip(self.allocators, sequence.tables, strict=True)):
            for index in shared[group]:
                (page,) = allocator.allocate(1)
                plan.copies.append((group, pages[index], page))
                allocator.release([pages[index]])
                pages[index] = page
                plan.entries[sequence.row, group, index] = page
            for page in allocator.allocate(missing[group]):
                plan.entries[sequence.row, group, len(pages)] = page
                pages.append(page)
        return True

    def _shared(self, sequence: Sequence) -> list[list[int]]:
        """By group, logical indices of pages that it will write and others read."""
        size, found = self.limits.page_size, []
        for allocator, pages, length in zip(self.allocators, sequence.tables, sequence.lengths, strict=True):
            found.append([i for i in range(length // size, len(pages)) if allocator.is_shared(pages[i])])
        return found

    def _free(self, wanted: list[int]) -> bool:
        """Whether each group has so many free pages."""
        return all(count <= allocator.num_free for count, allocator in zip(wanted, self.allocators, strict=True))

    def _free_up(self, wanted: list[int], sequence: Sequence) -> bool:
        """Takes pages from later sequences until so many are free. False if `sequence` had to give up."""
        while not self._free(wanted):
            if not self._make_room(sequence):
                return False
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Takes pages from whoever needs them least. True if some may be free now and `sequence` still runs."""
        return self.conversations.give_way() or self._reclaim_waiting() or self._preempt_after(sequence)

    def _reclaim_waiting(self, after: Sequence | None = None) -> bool:
        """Takes the pages that the last sequence in the queue which holds any was to start from."""
        for sequence in reversed(self.waiting):
            if sequence.pages and sequence is not after:
                self._give_back(sequence)
                sequence.restart()
                return True
        return False

    def _preempt_after(self, sequence: Sequence) -> bool:
        """Preempts the last running sequence. True if pages may be free now and `sequence` still runs."""
        victim = self.running[-1]
        if victim.has_pending:
            return False
        self.running.remove(victim)
        self.prefixes.keep(victim)
        self._release(victim)
        victim.restart()
        self.num_preemptions += 1
        self.add(victim)
        return victim is not sequence

    def _release(self, sequence: Sequence) -> None:
        self.prefixes.publish(sequence)
        self.prefixes.stop(sequence)
        self._give_back(sequence)
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
            sequence.row = -1

    def _give_back(self, sequence: Sequence) -> None:
        for allocator, pages in zip(self.allocators, sequence.tables, strict=True):
            allocator.release(pages)
        sequence.tables = [[] for _ in self.allocators]

    def _decode_steps(self, plan: StepPlan) -> int:
        """Several steps in one call pay only when no one waits for a row and nobody finishes half way."""
        steps = self.limits.num_decode_steps
        if steps == 1 or plan.chunks or plan.admitted or (self.waiting and self._free_rows):
            return 1
        if any(s.num_remaining < steps or s.needs_history or s.most_computable(steps) < steps for s in plan.decode):
            return 1
        size = self.limits.page_size
        extra = [
            sum(max(0, _pages(s.lengths[group] + steps, size) - len(s.tables[group])) for s in plan.decode)
            for group in range(len(self.allocators))
        ]
        if not self._free(extra):
            return 1
        for sequence in plan.decode:
            self._reserve(sequence, sequence.num_computed + steps, plan)
        return steps

    def _commit(self, plan: StepPlan) -> None:
        for sequence in plan.decode:
            plan.outputs.append((sequence, len(sequence.tokens)))
            sequence.tokens.extend([PENDING] * plan.num_steps)
            sequence.num_computed += plan.num_steps
        for chunk in plan.chunks:
            chunk.sequence.num_computed += chunk.count
            if chunk.samples:
                plan.outputs.append((chunk.sequence, len(chunk.sequence.tokens)))
                chunk.sequence.tokens.append(PENDING)
        for sequence in (*plan.decode, *(chunk.sequence for chunk in plan.chunks)):
            self.prefixes.publish(sequence)

    def _chunk_budget(self, num_decode: int) -> int:
        return min(self.limits.max_chunk, self.limits.max_num_batched_tokens - num_decode)


def _chunk(sequence: Sequence, count: int) -> Chunk:
    return Chunk(sequence, sequence.num_computed, count, samples=count == sequence.num_uncomputed)


def _pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def _order(sequence: Sequence) -> tuple:
    return sequence.order
