"""A runner without a device: pages hold hash chains, so that any wrong page, row or order changes the tokens."""

from __future__ import annotations

import itertools

import numpy as np

from sparsejax.cache.allocator import PageAllocator
from sparsejax.cache.prefix import CachedPage, PrefixCache
from sparsejax.cache.tiers.store import TieredStore
from sparsejax.engine.core import EngineCore
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.plan import StepPlan
from sparsejax.engine.policies import Policies
from sparsejax.engine.runner import Results
from sparsejax.engine.scheduler import Limits
from sparsejax.engine.sequence import Sequence
from sparsejax.engine.tiers import PageTiers
from sparsejax.sparsity.policy import declared

VOCAB = 97
PAGE_BYTES = 32
"""Of four tokens of eight bytes."""
EVICTING = (
    {"preset": "keydiff", "budget": 0.3, "recent": 3},
    {"preset": "keydiff", "budget": 20, "recent": 1, "sink": 0},
    {"preset": "rkv", "budget": 12, "recent": 2, "window": 4, "interval": 6},
)

PYRAMIDS = (
    {"preset": "keydiff", "budget": 0.4, "recent": 1, "sink": 0, "beta": 5},
    {"preset": "rkv", "budget": 14, "recent": 2, "window": 4, "interval": 6, "beta": 3},
)


def chain(previous: int, token: int) -> int:
    """What a page holds for a token: depends on every token before it."""
    return (previous * 1_000_003 + token * 7919 + 12345) % (2**31 - 1)


def next_token(state: int) -> int:
    return (state >> 5) % VOCAB


def expected(prompt: list[int], count: int) -> list[int]:
    """What an engine without paging, batching or preemption generates."""
    state, tokens = 0, []
    for token in prompt:
        state = chain(state, token)
    for _ in range(count):
        tokens.append(next_token(state))
        state = chain(state, tokens[-1])
    return tokens


class FakeRunner:
    """Executes plans in order, as a device does, and checks what the scheduler promised."""

    vocab_size = VOCAB
    rows_hold = True

    def __init__(self, limits: Limits, allocators: tuple[PageAllocator, ...], cache: PrefixCache):
        self.limits, self.allocators, self.cache = limits, allocators, cache
        self.sealed: list[CachedPage] = []  # as objects: a page may be forgotten and cached anew between two steps
        self.tables: dict[tuple[int, int, int], int] = {}
        self.memory: dict[tuple[int, int, int], int] = {}
        self.last: dict[int, int] = {}
        self.history: dict[int, list[list[int]]] = {}
        self.opened: dict[tuple[int, int, int], int] = {}

    def admit(self, row: int, values: dict, policy: None, keep: dict | None) -> None:
        self.opened = {slot: state for slot, state in self.opened.items() if slot[0] != row}

    def save_row(self, row: int) -> FakeRow:
        """What lies in the open page of each group, by slot."""
        size, histories = self.limits.page_size, self.history[row]
        return FakeRow(
            {
                (group, slot): states[slot]
                for group, states in enumerate(histories)
                for slot in range(len(states) // size * size, len(states))
            }
        )

    def load_row(self, row: int, saved: FakeRow) -> None:
        self.opened.update({(row, *slot): state for slot, state in saved.items()})

    def cut_caches(self, plan: StepPlan) -> None:
        """Moves the last tokens of each cache, after a look at all of them: none may have been written over."""
        size = self.limits.page_size
        for sequence in plan.admitted:
            start = sequence.num_computed - sum(chunk.count for chunk in plan.chunks if chunk.sequence is sequence)
            start -= plan.num_steps * (sequence in plan.decode)
            states = list(itertools.accumulate(sequence.tokens[:start], chain, initial=0))[1:]
            self.history[sequence.row] = [states[shift:] for shift in sequence.shifts]
        for cut in plan.evictions:
            for group, (length, kept, pages) in enumerate(zip(cut.lengths, cut.kept, cut.new_pages, strict=True)):
                old = [self._held(cut.row, group, slot) for slot in range(length)]
                assert kept <= length and old == self.history[cut.row][group][-length:]
                for slot, state in enumerate(old[-kept:]):
                    self.memory[group, pages[slot // size], slot % size] = state
                del self.history[cut.row][group][:-kept]
            self.opened = {slot: state for slot, state in self.opened.items() if slot[0] != cut.row}
        self.tables.update(plan.entries)

    def dispatch(self, plan: StepPlan, greedy: bool, prompt_logprobs: bool) -> np.ndarray:
        self._check(plan)
        self.cached = {page.page: page for page in self.cache}
        self.cut_caches(plan)
        for group, source, target in plan.copies:
            for offset in range(self.limits.page_size):
                if (group, source, offset) in self.memory:
                    self.memory[group, target, offset] = self.memory[group, source, offset]
        sampled = np.zeros((plan.num_steps, len(plan.outputs), 2), np.int32)
        for step, slot in itertools.product(range(plan.num_steps), range(len(plan.decode))):
            sequence = plan.decode[slot]
            at = sequence.num_computed - plan.num_steps + step
            token = sequence.tokens[at]
            token = token if token >= 0 else self.last[sequence.row]
            sampled[step, slot, 0] = self._compute(sequence, at, token)
        slot = len(plan.decode)
        for chunk in plan.chunks:
            for at in range(chunk.start, chunk.start + chunk.count):
                token = self._compute(chunk.sequence, at, chunk.sequence.tokens[at])
            if chunk.samples:
                sampled[0, slot, 0] = token
                slot += 1
        self.sealed = list(self.cached.values())
        return sampled

    def read(self, outputs: np.ndarray) -> Results:
        return Results(outputs, None)

    def decode_tiles(self, plan: StepPlan, evicted: bool = False) -> int:
        return len(plan.decode) * plan.num_steps

    def _compute(self, sequence: Sequence, at: int, token: int) -> int:
        assert token >= 0
        assert at != sequence.evict_at, "an eviction was due"
        row = sequence.row
        for place in [slot for slot in self.opened if slot[0] == row]:  # the page that it goes on in is its own by now
            self.memory[self._slot(*place)] = self.opened.pop(place)
        for group, (allocator, shift) in enumerate(zip(self.allocators, sequence.shifts, strict=True)):
            slot = at - shift
            previous = self.memory[self._slot(row, group, slot - 1)] if at else 0
            state = chain(previous, token)
            _, page, offset = self._slot(row, group, slot)
            cached = None if group else self.cached.get(page)
            assert allocator.references(page) == 1 + (cached is not None), "a shared page was written"
            assert cached is None or not any(one is cached for one in self.sealed), "a published page was written"
            self.memory[group, page, offset] = state
            self.history[row][group].append(state)
            assert not group or self.last[row] == next_token(state), "groups hold the same tokens"
            self.last[row] = next_token(state)
        return self.last[row]

    def _held(self, row: int, group: int, slot: int) -> int:
        opened = self.opened.get((row, group, slot))
        return self.memory[self._slot(row, group, slot)] if opened is None else opened

    def _slot(self, row: int, group: int, slot: int) -> tuple[int, int, int]:
        size = self.limits.page_size
        return group, self.tables[row, group, slot // size], slot % size

    def _check(self, plan: StepPlan) -> None:
        rows = [s.row for s in plan.decode] + [chunk.sequence.row for chunk in plan.chunks]
        assert len(set(rows)) == len(rows) <= self.limits.max_num_seqs
        assert all(0 <= row < self.limits.max_num_seqs for row in rows)
        assert sum(chunk.count for chunk in plan.chunks) <= self.limits.max_chunk
        assert len(plan.decode) + sum(chunk.count for chunk in plan.chunks) <= self.limits.max_num_batched_tokens
        assert plan.num_steps == 1 or not plan.chunks


class FakeRow(dict):
    """What a row holds besides its pages."""

    nbytes = 0

    def settle(self) -> None:
        """It is here at once."""


class Leaky(TieredStore):
    """Loses every `n`-th page that it is asked for, as a damaged disk does; never if 0."""

    def __init__(self, host_bytes: int, n: int):
        super().__init__(host_bytes)
        self.n, self.asked = n, 0

    def get(self, hash: bytes):
        self.asked += 1
        return None if self.n and self.asked % self.n == 0 else super().get(hash)


class FakeTransfers:
    """Pages of a `FakeRunner` as bytes. A save is done at once: what steps write later must not show in it."""

    def __init__(self, runner: FakeRunner):
        self._runner = runner
        self.page_bytes = PAGE_BYTES

    def begin_save(self, page_ids: list[int]) -> FakeTransfers.Saved:
        size = self._runner.limits.page_size
        slots = [[self._runner.memory.get((0, page, at), -1) for at in range(size)] for page in page_ids]
        return self.Saved([np.array(states).view(np.uint8) for states in slots])

    def load(self, page_ids: list[int], payloads: list[np.ndarray]) -> None:
        for page, payload in zip(page_ids, payloads, strict=True):
            self._runner.memory.update({(0, page, at): int(state) for at, state in enumerate(payload.view(int))})

    class Saved:
        def __init__(self, pages: list[np.ndarray]):
            self._pages = pages

        def payloads(self) -> list[np.ndarray]:
            return self._pages


def check_pages(core: EngineCore) -> None:
    """Free pages and live ones make the pool; every live page is counted once per reader."""
    scheduler = core.scheduler
    for group, allocator in enumerate(scheduler.allocators):
        readers = np.zeros(allocator.num_pages, int)
        for sequence in [*scheduler.running, *scheduler.waiting]:
            np.add.at(readers, sequence.tables[group], 1)
        for kept in scheduler.conversations:
            np.add.at(readers, [] if kept.tables is None else np.array(kept.tables[group], int), 1)
        live = int((readers > 0).sum())
        cached = [] if group else list(scheduler.prefixes.cache)
        np.add.at(readers, [page.page for page in cached], 1)
        assert len({page.page for page in cached}) == len(cached)
        held = [allocator.references(page) for page in range(allocator.num_pages)]
        assert held == readers.tolist()
        assert allocator.num_free + allocator.num_live == allocator.capacity
        assert allocator.num_live == live


def make_core(
    num_pages: int = 40,
    max_num_seqs: int = 5,
    budget: int = 16,
    page_size: int = 4,
    steps: int = 1,
    share_whole_pages: bool = False,
    deeper: tuple[int, ...] = (),
    store: TieredStore | None = None,
    conversation_pages: int | None = None,
    **caching: bool,
):
    """A core whose further cache groups have `deeper` pages."""
    kept = share_whole_pages, conversation_pages
    limits = Limits(max_num_seqs, budget, budget - max_num_seqs, page_size, steps, *kept)
    allocators = tuple(map(PageAllocator, (num_pages, *deeper)))
    cache = PrefixCache(allocators[0], page_size)
    policies = declared(("dense", *EVICTING, *(PYRAMIDS if deeper else ())))
    runner = FakeRunner(limits, allocators, cache)
    return EngineCore(
        runner,
        allocators,
        limits,
        max_model_len=120,
        eos_ids=(0,),
        tokenizer=None,
        seed=0,
        policies=Policies(policies, None, len(allocators), 120),
        cache=cache,
        tiers=None if store is None else PageTiers(FakeTransfers(runner), store),
        **{"prefix_caching": not deeper, **caching},
    )


def greedy(**options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **options})
