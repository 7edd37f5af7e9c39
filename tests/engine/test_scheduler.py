"""The scheduler through the engine core on a fake device: any mix of requests gives each its own tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.prompts import Prompt
from sparsejax.errors import CapacityError, RequestError
from tests.engine.fake import EVICTING, PYRAMIDS, VOCAB, expected, greedy, make_core
from tests.engine.traffic import Traffic, TrafficMachine

prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60)


class RequestMachine(TrafficMachine):
    options, policies = dict(num_pages=24, steps=3), EVICTING

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 30),
        n=st.integers(1, 3),
        priority=st.integers(0, 2),
        stop=st.booleans(),
        place=st.integers(-2, 9),
    )
    def add(self, place, **request):
        sparsity = None if place < 0 else self.policies[place % len(self.policies)]
        self.traffic.add(**request, sparsity=sparsity)


class PyramidMachine(RequestMachine):
    """Three cache groups, each with pages of its own, whose budgets differ."""

    options, policies = {**RequestMachine.options, "deeper": (21, 18)}, (*EVICTING, *PYRAMIDS)


TestPyramids = PyramidMachine.TestCase
TestPyramids.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestTraffic = RequestMachine.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    "operations,num_pages,budget,steps,whole",
    [(10_000, 30, 6, 1, False), (2000, 30, 16, 4, False), (2000, 200, 64, 2, False), (2000, 30, 16, 4, True)],
)
def test_thousands_of_random_operations_conserve_pages(operations, num_pages, budget, steps, whole):
    rng = random.Random(num_pages + budget)
    traffic = Traffic(num_pages=num_pages, budget=budget, steps=steps, share_whole_pages=whole)
    for _ in range(operations):
        action = rng.random()
        if action < 0.12 and len(traffic.core.request_ids()) < 12:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))]
            sparsity = rng.choice([None, None, *EVICTING])
            n, priority, stop = rng.choice([1, 1, 1, 2, 4]), rng.randint(0, 1), rng.random() < 0.3
            traffic.add(prompt, rng.randint(1, 30), n, priority, stop, sparsity=sparsity)
        elif action < 0.14:
            traffic.abort(rng.randrange(100))
        else:
            traffic.step()
    traffic.finish()
    assert traffic.num_finished > operations // 100
    if num_pages == 30:
        assert traffic.core.scheduler.num_preemptions > operations // 500


def test_requests_start_in_order_and_none_starves():
    core = make_core(num_pages=20, max_num_seqs=2)
    order: list[str] = []
    for i in range(12):
        core.add(f"r{i}", Prompt(None, [i + 1] * (3 + 5 * (i % 3))), greedy(max_tokens=9))
    while core.has_unfinished:
        order += [output.request_id for output in core.step() if output.finished]
    first_tokens = [f"r{i}" for i in range(12)]
    assert sorted(order) == sorted(first_tokens)
    # Two rows: nobody overtakes by more than its one neighbour.
    assert all(abs(order.index(name) - i) <= 2 for i, name in enumerate(first_tokens))


def test_priority_runs_first_and_a_later_important_request_overtakes():
    core = make_core(max_num_seqs=1, budget=16)
    for name, priority in (("a", 1), ("b", 1), ("urgent", 0)):
        core.add(name, Prompt(None, [5, 6, 7]), greedy(max_tokens=4), priority)
    order = []
    while core.has_unfinished:
        order += [output.request_id for output in core.step() if output.finished]
    assert order == ["urgent", "a", "b"]


def test_samples_share_the_prompts_pages():
    core = make_core(num_pages=60, max_num_seqs=5)
    prompt = [3] * 41  # ten full pages and one token
    core.add("r", Prompt(None, prompt), SamplingParams(n=4, max_tokens=3, temperature=1.0))
    most = 0
    while core.has_unfinished:
        core.step()
        most = max(most, core.scheduler.allocator.num_live)
    assert most <= 10 + 4 + 1


def test_samples_that_share_whole_pages_only_copy_none():
    core = make_core(num_pages=60, share_whole_pages=True)
    prompt, copies, most = [3] * 42, [], 0  # ten full pages and two tokens
    dispatch, core.runner.dispatch = core.runner.dispatch, lambda plan, *rest: (
        copies.extend(plan.copies),
        dispatch(plan, *rest),
    )[1]
    core.add("r", Prompt(None, prompt), SamplingParams(n=4, max_tokens=3, temperature=1.0, ignore_eos=True))
    while core.has_unfinished:
        for output in core.step():
            last = output
        most = max(most, core.scheduler.allocator.num_live)
    assert [choice.token_ids for choice in last.outputs] == [expected(prompt, 3)] * 4
    assert not copies
    assert most <= 10 + 4 * 2


def test_a_request_larger_than_the_pool_is_refused_with_the_figures():
    core = make_core(num_pages=10)
    with pytest.raises(CapacityError, match=r"60 tokens = 15 pages of 4.*pool has 9"):
        core.add("r", Prompt(None, [1] * 50), greedy(max_tokens=10))
    with pytest.raises(RequestError, match="leaves room for at most 119"):
        core.add("r", Prompt(None, [1] * 120), greedy(max_tokens=10))
    assert not core.has_unfinished


def test_a_request_id_in_use_is_refused():
    core = make_core()
    core.add("r", Prompt(None, [1, 2]), greedy(max_tokens=2))
    with pytest.raises(RequestError, match="in use"):
        core.add("r", Prompt(None, [1, 2]), greedy(max_tokens=2))


def test_pages_waste_only_the_last_one():
    core = make_core(num_pages=400, max_num_seqs=5, budget=32, page_size=16)
    for i in range(5):
        core.add(f"r{i}", Prompt(None, [2] * (17 + 13 * i)), greedy(max_tokens=30))
    while core.has_unfinished:
        core.step()
        for sequence in core.scheduler.running:
            assert len(sequence.pages) <= -(-len(sequence.tokens) // 16)
