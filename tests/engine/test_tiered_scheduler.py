"""The scheduler over tiers of pages, without a device: right tokens and conserved pages whatever is lost on the way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.cache.tiers.store import TieredStore
from sparsejax.engine.costs import Costs
from sparsejax.engine.prompts import Prompt
from tests.engine.fake import EVICTING, PAGE_BYTES, VOCAB, Leaky, check_pages, expected, greedy, make_core

CUT = EVICTING[1]
"""Evicts once, and leaves whole pages."""


def prompts_of(seed: int) -> list[list[int]]:
    """Prompts that share heads of many lengths."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(3)]
    tails = ([rng.randrange(VOCAB)] * rng.randrange(4) for _ in range(12))
    return [rng.choice(stems)[: rng.randrange(1, 60)] + tail for tail in tails]


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pages=st.integers(24, 45),
    host=st.integers(1, 80),
    n=st.sampled_from((0, 0, 3, 7)),
    steps=st.sampled_from((1, 3)),
    whole=st.booleans(),
)
def test_every_request_gets_its_tokens_and_no_page_is_lost(seed, pages, host, n, steps, whole):
    rng, prompts, store = random.Random(seed), prompts_of(seed), Leaky(host * PAGE_BYTES, n)
    core = make_core(pages, max_num_seqs=4, steps=steps, share_whole_pages=whole, store=store)
    wanted, got = {}, {}

    def take(outputs):
        for output in outputs:
            if output.finished:
                got[output.request_id] = [choice.token_ids for choice in output.outputs]
        check_pages(core)

    for turn in range(25):
        for index in range(rng.randrange(3)):
            prompt, count, samples = rng.choice(prompts), rng.randrange(1, 8), rng.choice((1, 1, 2))
            name, policy = f"{turn}.{index}", rng.choice((None, None, CUT))
            params = greedy(max_tokens=count, n=samples, temperature=samples - 1.0, sparsity=policy)
            # Requests that are cut at the same place of the same prompt start from what another one left.
            at = max(len(prompt) // 20 * 20, 1) if policy else None
            core.add(name, Prompt(None, prompt, compress_at=at), params)
            wanted[name] = [expected(prompt, count)] * samples
        for _ in range(rng.randrange(4)):
            take(core.step())
        if core.request_ids() and rng.random() < 0.2:
            name = rng.choice(core.request_ids())
            del wanted[name]
            core.abort([name])
            check_pages(core)
    while core.has_unfinished:
        take(core.step())
    assert {name: got[name] for name in wanted} == wanted
    assert core.scheduler.allocator.num_live == 0
    core.step()  # drops fetches of aborted requests
    assert not core.scheduler.prefixes._coming and not core.scheduler.restores._fetches
    assert store.host_bytes <= host * PAGE_BYTES
    core.close()


def serve(core, prompts: list[list[int]]) -> None:
    for number, prompt in enumerate(prompts):
        core.add(str(number), Prompt(None, prompt), greedy(max_tokens=2))
        while core.has_unfinished:
            for output in core.step():
                assert output.outputs[0].token_ids == expected(prompt, 2)[: len(output.outputs[0].token_ids)]


def test_what_the_device_drops_comes_back():
    prompts = [[number] * 60 for number in range(1, 9)]
    core = make_core(24, store=TieredStore(10_000))
    serve(core, prompts)
    computed = core.counters["computed_tokens"]
    core.tiers.costs.seconds.clear()
    serve(core, prompts)
    assert core.counters["computed_tokens"] - computed <= 8 * 6
    assert core.tiers.stats()["kv_pages_loaded"] == core.tiers.stats()["host_kv_hits"] == 8 * 14


@pytest.mark.parametrize("lost", (False, True))
def test_what_an_eviction_left_comes_back_whole_or_not_at_all(lost):
    store = Leaky(10_000, 0)
    core = make_core(24, store=store)
    core.tiers.costs.note = lambda *measured: None

    def ask(number: int, name: str) -> int:
        prompt = [*[number] * 50, 3, 4]
        core.add(name, Prompt(None, prompt, compress_at=50), greedy(max_tokens=2, sparsity=CUT))
        while core.has_unfinished:
            for output in core.step():
                assert output.outputs[0].token_ids == expected(prompt, 2)[: len(output.outputs[0].token_ids)]
            check_pages(core)
        return output.num_cached_tokens

    assert [ask(number, "first") for number in range(1, 9)] == [0] * 8
    store.n = 3 if lost else 0
    loaded = core.tiers.counters["loaded"]
    assert ask(1, "again") == (0 if lost else 50)
    assert core.tiers.counters["loaded"] - loaded == (0 if lost else 5)
    assert ask(1, "once more") == 50, "it is on the device now"
    core.step()
    assert not core.scheduler.prefixes._coming and not core.scheduler.restores._fetches
    core.close()


def test_what_is_computed_sooner_is_computed():
    prompts = [[number] * 60 for number in range(1, 9)]
    core = make_core(24, store=TieredStore(10_000))
    serve(core, prompts)
    core.tiers.costs.seconds = {"host": 1.0, "load": 1.0, "compute": 0.001}
    serve(core, prompts[:2])
    assert core.tiers.stats()["kv_pages_loaded"] == 0 and core.tiers.stats()["kv_pages_passed"] == 2


def test_a_step_of_few_tokens_says_little_about_a_page():
    costs = Costs()
    for _ in range(3):
        costs.note("compute", 0.04, 8)
        costs.note("compute", 0.02, 1 / 32)
    assert 0.005 < costs.seconds["compute"] < 0.01, "a mean over measurements would be above 0.3"



def test_costs_are_running_means_and_a_loser_is_tried_again():
    costs = Costs()
    assert costs.pays("host")
    costs.note("host", 2.0, 2)
    costs.note("load", 1.0, 1)
    costs.note("compute", 1.5, 1)
    costs.note("compute", 4.2, 1)  # (0.8 x 1.5 + 4.2) / (0.8 x 1 + 1)
    assert costs.seconds == pytest.approx({"host": 1.0, "load": 1.0, "compute": 3.0}) and costs.pays("host")
    costs.note("host", 6.2, 1)
    assert costs.seconds["host"] == pytest.approx(3.0) and not costs.pays("host")
    assert 15 < [costs.pays("host") for _ in range(30)].index(True) < 25, "0.98 to the 20th is two thirds"
    assert costs.pays("disk")


def test_sequences_that_want_the_same_pages_fetch_them_once():
    prompt = [5] * 50
    core = make_core(24, store=TieredStore(10_000))
    serve(core, [prompt, *([number] * 60 for number in range(10, 14))])
    core.tiers.costs.seconds.clear()
    before = core.tiers.stats()["host_kv_hits"]
    for number in range(4):
        core.add(f"same {number}", Prompt(None, [*prompt, number]), greedy(max_tokens=1))
    while core.has_unfinished:
        core.step()
    assert core.tiers.stats()["host_kv_hits"] - before == 12


@pytest.mark.parametrize("compute", (9.0, 1.0))
def test_a_preempted_sequence_comes_back_from_below_where_that_costs_less(compute):
    """By measured seconds a page: fixed here, so that nothing depends on a clock."""
    core = make_core(26, max_num_seqs=2, store=TieredStore(10_000))
    core.tiers.costs.note = lambda *measured: None
    core.tiers.costs.seconds = {"host": 1.0, "load": 1.0, "compute": compute}
    prompts, got = [[number] * 40 for number in (1, 2)], {}
    for number, prompt in enumerate(prompts):
        core.add(str(number), Prompt(None, prompt), greedy(max_tokens=40))
    while core.has_unfinished:
        got.update({output.request_id: output.outputs[0].token_ids for output in core.step()})
        check_pages(core)
    assert got == {str(number): expected(prompt, 40) for number, prompt in enumerate(prompts)}
    stats, again = core.tiers.stats(), core.counters["computed_tokens"] - 2 * (40 + 39)
    assert core.scheduler.num_preemptions > 0 and stats["kv_pages_saved"] > 0
    if compute > 2:
        assert stats["kv_pages_loaded"] > 0 == stats["kv_pages_passed"] and again <= 4 * core.scheduler.num_preemptions
    else:
        assert stats["kv_pages_loaded"] == 0 < stats["kv_pages_passed"] and again > 4 * core.scheduler.num_preemptions
