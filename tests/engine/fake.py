"""A runner without a device: pages hold hash chains, so that any wrong page, row or order changes the tokens."""

from __future__ import annotations

import itertools

import numpy as np

from sparsejax.cache.allocator import PageAllocator
from sparsejax.cache.prefix import PrefixCache
from sparsejax.cache.tiers.store import TieredStore
from sparsejax.engine.core import EngineCore
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.policies import Policies
from sparsejax.engine.runner import Results
from sparsejax.engine.scheduler import Limits, StepPlan
from sparsejax.engine.sequence import Sequence
from sparsejax.engine.tiers import PageTiers
from sparsejax.sparsity.policy import declared

VOCAB = 97
EVICTING = (
    {"preset": "keydiff", "budget": 0.3, "recent": 3},
    {"preset": "keydiff", "budget": 20, "recent": 1, "sink": 0},
    {"preset": "rkv", "budget": 12, "recent": 2, "window": 4, "interval": 6},
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

    def __init__(self, limits: Limits, allocator: PageAllocator, cache: PrefixCache):
        self.limits, self.allocator, self.cache = limits, allocator, cache
        self.sealed: set[tuple[int, bytes]] = set()
        self.tables: dict[tuple[int, int], int] = {}
        self.memory: dict[tuple[int, int], int] = {}
        self.last: dict[int, int] = {}
        self.history: dict[int, list[int]] = {}
        self._on_take, allocator.on_take = allocator.on_take, self._taken

    def _taken(self, pages: list[int]) -> None:
        """Pages leave the cache: whoever has them now may write."""
        self.sealed = {(page, hash) for page, hash in self.sealed if page not in pages}
        self._on_take(pages)

    def admit(self, row: int, values: dict, policy: None, keep: dict | None) -> None:
        pass

    def cut_caches(self, plan: StepPlan) -> None:
        """Moves the last tokens of each cache, after a look at all of them: none may have been written over."""
        size = self.limits.page_size
        for cut in plan.evictions:
            old = [self.memory[self._slot(cut.row, slot)] for slot in range(cut.length)]
            assert cut.kept < cut.length and old == self.history[cut.row][-cut.length :]
            for slot, state in enumerate(old[-cut.kept :]):
                self.memory[cut.new_pages[slot // size], slot % size] = state
            del self.history[cut.row][: -cut.kept]
        self.tables.update(plan.entries)

    def dispatch(self, plan: StepPlan, greedy: bool, prompt_logprobs: bool) -> np.ndarray:
        self._check(plan)
        self.cached = {page.page: page.hash for page in self.cache}
        for sequence in plan.admitted:
            start = sequence.num_computed - sum(chunk.count for chunk in plan.chunks if chunk.sequence is sequence)
            start -= plan.num_steps * (sequence in plan.decode)
            states = itertools.accumulate(sequence.tokens[:start], chain, initial=0)
            self.history[sequence.row] = list(states)[1:]
        self.cut_caches(plan)
        for source, target in plan.copies:
            for offset in range(self.limits.page_size):
                if (source, offset) in self.memory:
                    self.memory[target, offset] = self.memory[source, offset]
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
        self.sealed = set(self.cached.items())
        return sampled

    def read(self, outputs: np.ndarray) -> Results:
        return Results(outputs, None)

    def decode_tiles(self, plan: StepPlan, evicted: bool = False) -> int:
        return len(plan.decode) * plan.num_steps

    def _compute(self, sequence: Sequence, at: int, token: int) -> int:
        assert token >= 0
        row, slot = sequence.row, at - sequence.shift
        assert at != sequence.evict_at, "an eviction was due"
        previous = self.memory[self._slot(row, slot - 1)] if at else 0
        state = chain(previous, token)
        page, offset = self._slot(row, slot)
        cached = self.cached.get(page)
        assert self.allocator.references(page) == 1 + (cached is not None), "a shared page was written"
        assert (page, cached) not in self.sealed, "a published page was written"
        self.memory[page, offset] = state
        self.history[row].append(state)
        self.last[row] = next_token(state)
        return self.last[row]

    def _slot(self, row: int, slot: int) -> tuple[int, int]:
        return self.tables[row, slot // self.limits.page_size], slot % self.limits.page_size

    def _check(self, plan: StepPlan) -> None:
        rows = [s.row for s in plan.decode] + [chunk.sequence.row for chunk in plan.chunks]
        assert len(set(rows)) == len(rows) <= self.limits.max_num_seqs
        assert all(0 <= row < self.limits.max_num_seqs for row in rows)
        assert sum(chunk.count for chunk in plan.chunks) <= self.limits.max_chunk
        assert len(plan.decode) + sum(chunk.count for chunk in plan.chunks) <= self.limits.max_num_batched_tokens
        assert plan.num_steps == 1 or not plan.chunks


class FakeTransfers:
    """Pages of a `FakeRunner` as bytes. A save is done at once: what steps write later must not show in it."""

    def __init__(self, runner: FakeRunner):
        self._runner = runner

    def begin_save(self, page_ids: list[int]) -> FakeTransfers.Saved:
        size = self._runner.limits.page_size
        pages = [np.array([self._runner.memory[page, at] for at in range(size)]).view(np.uint8) for page in page_ids]
        return self.Saved(pages)

    def load(self, page_ids: list[int], payloads: list[np.ndarray]) -> None:
        for page, payload in zip(page_ids, payloads, strict=True):
            self._runner.memory.update({(page, at): int(state) for at, state in enumerate(payload.view(int))})

    class Saved:
        def __init__(self, pages: list[np.ndarray]):
            self._pages = pages

        def payloads(self) -> list[np.ndarray]:
            return self._pages


def check_pages(core: EngineCore) -> None:
    """Free pages and live ones make the pool; every live page is counted once per reader."""
    allocator, scheduler = core.scheduler.allocator, core.scheduler
    readers = np.zeros(allocator.num_pages, int)
    for sequence in [*scheduler.running, *scheduler.waiting]:
        np.add.at(readers, sequence.pages, 1)
    live = int((readers > 0).sum())
    cached = list(scheduler.prefixes.cache)
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
    store: TieredStore | None = None,
):
    limits = Limits(max_num_seqs, budget, budget - max_num_seqs, page_size, steps, share_whole_pages)
    allocator = PageAllocator(num_pages)
    cache = PrefixCache(allocator, page_size)
    runner = FakeRunner(limits, allocator, cache)
    return EngineCore(
        runner,
        allocator,
        limits,
        max_model_len=120,
        eos_ids=(0,),
        tokenizer=None,
        seed=0,
        policies=Policies(declared(("dense", *EVICTING)), None, 1, 120),
        cache=cache,
        tiers=None if store is None else PageTiers(FakeTransfers(runner), store),
    )


def greedy(**options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **options})
