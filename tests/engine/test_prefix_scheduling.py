"""Cached prefixes on a fake device: who shares what, who waits, and that pages are conserved."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from sparsejax.engine.core import EngineCore
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.prompts import Prompt
from tests.engine.fake import EVICTING, PAGE_BYTES, VOCAB, Leaky, check_pages, expected, greedy, make_core
from tests.engine.traffic import Traffic, TrafficMachine

TREE = [[(7 * branch + at) % VOCAB for at in range(40)] for branch in range(3)]


def check_tree(core: EngineCore) -> None:
    """Every cached page hangs on the root or on a cached page, and one that somebody reads on pages that are read."""
    cache, allocator = core.scheduler.prefixes.cache, core.scheduler.allocator
    pages = {page.hash: page for page in cache}
    roots = {page.parent for page in cache} - pages.keys()
    assert roots <= {cache.root(salt) for salt in (None, "a", "b")}
    idle = sum(allocator.references(page.page) == 1 for page in cache)
    assert idle == allocator.num_idle
    for page in cache:
        assert allocator.references(page.page) >= 1 and len(page.tokens) == cache.page_size
        if page.parent in pages and allocator.references(page.page) > 1:
            assert allocator.references(pages[page.parent].page) > 1


def check(core: EngineCore) -> None:
    check_pages(core)
    check_tree(core)


class PrefixMachine(TrafficMachine):
    """Requests that begin alike, of several tenants."""

    options = dict(check=check, num_pages=22, steps=2)

    @rule(
        branch=st.integers(0, 2),
        shared=st.integers(0, 40),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=9),
        max_tokens=st.integers(1, 20),
        n=st.integers(1, 2),
        cache_salt=st.sampled_from([None, "a", "b"]),
        sparsity=st.sampled_from([None, None, *EVICTING]),
    )
    def add(self, branch, shared, tail, **request):
        self.traffic.add(TREE[branch][:shared] + tail or [1], **request)


class TieredMachine(PrefixMachine):
    """Above main memory that loses pages."""

    @property
    def options(self):
        return {**PrefixMachine.options, "store": Leaky(40 * PAGE_BYTES, 5)}

    def __init__(self):
        super().__init__()
        self.traffic.core.tiers.costs.note = lambda *measured: None  # nothing hangs on a clock

    def teardown(self):
        super().teardown()
        self.traffic.core.close()


TestTiers = TieredMachine.TestCase
TestTiers.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestPrefixes = PrefixMachine.TestCase
TestPrefixes.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    "options",
    [dict(num_pages=22), dict(num_pages=22, share_whole_pages=True, steps=3), dict(num_pages=150, budget=40, steps=2)],
    ids=str,
)
def test_random_requests_that_begin_alike(options):
    rng, traffic = random.Random(3), Traffic(check, **options)
    for _ in range(250):
        action = rng.random()
        if action < 0.3 and len(traffic.core.request_ids()) < 14:
            tail = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 9))]
            prompt = TREE[rng.randrange(3)][: rng.randint(0, 40)] + tail or [1]
            more = dict(cache_salt=rng.choice([None, "a"]), sparsity=rng.choice([None, None, *EVICTING]))
            traffic.add(prompt, rng.randint(1, 20), rng.choice([1, 1, 3]), **more)
        elif action < 0.33 and traffic.core.request_ids():
            traffic.abort(rng.randrange(100))
        else:
            traffic.step()
    traffic.finish()
    assert traffic.num_cached > 20
    if options["num_pages"] == 22:
        assert traffic.core.scheduler.num_preemptions > 1


def run(core: EngineCore) -> tuple[dict[str, int], int]:
    """Cached tokens by request, and the most pages that were live at once."""
    cached, most = {}, 0
    while core.has_unfinished:
        for output in core.step():
            cached[output.request_id] = output.num_cached_tokens
        most = max(most, core.scheduler.allocator.num_live)
    check(core)
    return cached, most


def test_a_hundred_users_with_one_prefix_compute_and_hold_it_once():
    core = make_core(num_pages=400, max_num_seqs=10, budget=40)
    prefix = TREE[0] * 2
    for user in range(100):
        core.add(f"r{user}", Prompt(None, [*prefix, user % VOCAB, user // 2]), greedy(max_tokens=3))
    cached, most = run(core)
    assert cached.pop("r0") == 0
    assert set(cached.values()) == {80}
    assert core.counters["computed_tokens"] <= 80 + 100 * (2 + 3)
    assert most <= 20 + 10 * 2
    assert core.counters["prefix_cache_queries"] == 100 * 82
    assert core.counters["prefix_cache_hits"] == 99 * 80


def test_who_waits_for_a_prefix_goes_on_when_its_reader_is_aborted():
    core = make_core(num_pages=100, budget=10)
    for name in ("first", "second", "third"):
        core.add(name, Prompt(None, TREE[0]), greedy(max_tokens=2))
    core.step()
    core.step()
    assert len(core.scheduler.waiting) == 2
    core.abort(["first"])
    cached, _ = run(core)
    assert cached["second"] > 0 and cached["third"] == 36


def test_others_pass_who_waits():
    core = make_core(num_pages=100, budget=40)
    for name, prompt in (("long", TREE[0]), ("same", TREE[0]), ("other", TREE[1][:2])):
        core.add(name, Prompt(None, prompt), greedy(max_tokens=2))
    order = []
    while core.has_unfinished:
        order += [output.request_id for output in core.step() if output.finished]
    assert order == ["long", "other", "same"]


def test_salts_never_meet():
    core = make_core(num_pages=200)
    for salt in ("a", "b", None, "a"):
        core.add("r", Prompt(None, TREE[0]), greedy(max_tokens=2, cache_salt=salt))
        cached, _ = run(core)
    assert cached["r"] == 39  # the second "a"
    hits = Counter(page.parent for page in core.scheduler.prefixes.cache)
    assert sum(hits[core.scheduler.prefixes.cache.root(salt)] for salt in ("a", "b", None)) == 3


@pytest.mark.parametrize(
    ("params", "cached"),
    [
        (dict(), 39),
        (dict(prompt_logprobs=0), 0),
        (dict(sparsity=EVICTING[0]), 39),
        (dict(sparsity=EVICTING[2]), 36),
        (dict(sparsity={**EVICTING[2], "interval": 30}), 38),
    ],
    ids=str,
)
def test_how_much_of_a_known_prompt_is_skipped(params, cached):
    """All but the last token, and those that an eviction looks at: for rkv the last 4 of the prompt, or of 12 + 30."""
    core = make_core(num_pages=100)
    core.add("first", Prompt(None, TREE[0]), greedy(max_tokens=1))
    run(core)
    core.add("second", Prompt(None, TREE[0]), SamplingParams(**vars(greedy(max_tokens=1)) | params))
    assert run(core)[0]["second"] == cached


def test_whole_pages_only_where_open_pages_are_apart():
    core = make_core(num_pages=100, share_whole_pages=True)
    for name in ("first", "second"):
        core.add(name, Prompt(None, TREE[0]), greedy(max_tokens=1))
        cached, _ = run(core)
    assert cached["second"] == 36


@pytest.mark.parametrize("outputs", [False, True])
def test_generated_tokens_are_shared_only_where_asked_for(outputs):
    core = make_core(num_pages=100, cache_outputs=outputs)
    core.add("first", Prompt(None, TREE[0]), greedy(max_tokens=10))
    run(core)
    core.add("second", Prompt(None, TREE[0] + expected(TREE[0], 10)), greedy(max_tokens=1))
    assert run(core)[0]["second"] == (48 if outputs else 40)


def test_a_preempted_sequence_goes_on_from_its_own_pages_and_nobody_else_finds_them():
    core = make_core(num_pages=30, max_num_seqs=2, budget=20)
    prompt = TREE[0][:9]
    core.add("urgent", Prompt(None, TREE[1][:9]), greedy(max_tokens=60), priority=0)
    core.add("victim", Prompt(None, prompt), greedy(max_tokens=60), priority=1)
    while core.scheduler.num_preemptions == 0:
        core.step()
    (victim,) = core.scheduler.waiting
    owned = len(victim.hashes)
    assert owned * 4 > 9 + 20
    core.abort(["urgent"])
    core.step()
    assert victim.num_cached == 4 * owned
    core.add("other", Prompt(None, prompt + expected(prompt, 20)), greedy(max_tokens=1))
    cached, _ = run(core)
    assert cached["other"] == 8


def test_caching_may_be_off():
    core = make_core(num_pages=100, prefix_caching=False)
    for name in ("first", "second"):
        core.add(name, Prompt(None, TREE[0]), greedy(max_tokens=1))
        cached, _ = run(core)
    assert cached["second"] == 0 and core.counters["prefix_cache_queries"] == 0
    assert core.scheduler.allocator.num_idle == 0


def test_what_an_eviction_inside_a_prompt_leaves_is_shared():
    """Questions on one document, which the policy compresses before it reads them: it is read and cut once."""
    core = make_core(80, max_num_seqs=4)
    policy = {"preset": "keydiff", "budget": 20, "recent": 1, "sink": 0}
    document, got = [3] * 50, {}

    def ask(numbers, **params):
        for number in numbers:
            prompt = Prompt(None, [*document, number, 9], compress_at=50)
            core.add(str(number), prompt, greedy(max_tokens=3, sparsity=policy, **params))
        while core.has_unfinished:
            for output in core.step():
                got[int(output.request_id)] = output.outputs[0].token_ids, output.num_cached_tokens
            check_pages(core)
        for number in numbers:
            assert got[number][0] == expected([*document, number, 9], 3)
        return [got[number][1] for number in numbers]

    assert ask(range(4)) == [0, 50, 50, 50]
    assert core.counters["computed_tokens"] == 50 + 4 * (2 + 2)
    assert ask([5]) == [50]
    assert ask([6], cache_salt="of another tenant") == [0]
    document[0] = 4
    assert ask([7]) == [0]
    core.add("dense", Prompt(None, [*document, 8]), greedy(max_tokens=1))
    while core.has_unfinished:
        (output,) = core.step() or [None]
    assert output.num_cached_tokens == 48  # full pages from before the cut
    assert core.scheduler.allocator.num_live == 0


def test_an_abort_before_the_cut_lets_the_next_one_cut():
    core = make_core(80, max_num_seqs=4)
    policy = {"preset": "keydiff", "budget": 20, "recent": 1, "sink": 0}
    for number in range(3):
        prompt = Prompt(None, [*[3] * 50, number], compress_at=50)
        core.add(str(number), prompt, greedy(max_tokens=2, sparsity=policy))
    core.step()
    core.abort(["0"])
    got = {}
    while core.has_unfinished:
        got |= {output.request_id: output for output in core.step()}
        check_pages(core)
    assert all(got[str(n)].outputs[0].token_ids == expected([*[3] * 50, n], 2) for n in (1, 2))
    assert got["2"].num_cached_tokens == 50 and not core.scheduler.prefixes._coming
