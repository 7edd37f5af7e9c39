"""Bytes of key bounds that a step reads to select, against counts by hand."""

from __future__ import annotations

import itertools

import pytest

from sparsejax.evaluation.bounds import scored
from sparsejax.evaluation.policies import Policy
from sparsejax.evaluation.runner import measure_kv
from sparsejax.evaluation.suite import Request
from sparsejax.evaluation.tasks import Turn
from sparsejax.sparsity.policy import SparsityConfig
from tests.engine.models import random_prompts, tiny_engine

PINNED = (("sink", 16), ("recent", 16))
BLOCKS = (*PINNED, ("block", 4), ("candidates", 1))
BOUNDS = 2 * 2 * 16 * 4
"""Bytes of the bounds of a page in a layer: the least and the largest of 16 float32 channels of 2 heads."""


@pytest.fixture(scope="module")
def bounds():
    """By policy, what a step reads after a prompt of 432 tokens: 28 pages of 16 in each of its 16 decode steps."""
    (prompt,) = random_prompts(3, (432,))
    request = Request(tuple(prompt), len(prompt), Turn("", ("a",), frozenset(), False, ""))
    policies = {
        "quest": Policy("quest", 64, PINNED),
        "one of two layers": Policy("quest", 64, (*PINNED, ("dense_layers", 1))),
        "every fourth step": Policy("quest", 64, (*PINNED, ("interval", 4))),
        "blocks": Policy("quest", 64, BLOCKS),
        "of 160 tokens": Policy("keydiff:160+quest", 64, PINNED),
        "everything": Policy("quest", 512),
    }
    with tiny_engine(sparsity=[policy.sparsity for policy in policies.values()]) as engine:
        engine.generate(prompt[:20])  # what it leaves behind is not counted
        return {name: measure_kv(engine, policy, request).bounds for name, policy in policies.items()}


def test_bounds_read_are_those_counted_by_hand(bounds) -> None:
    assert bounds["quest"] == 2 * 28 * BOUNDS
    assert bounds["one of two layers"] == 28 * BOUNDS and bounds["every fourth step"] == 2 * 28 * BOUNDS / 4
    assert bounds["of 160 tokens"] == 2 * 11 * BOUNDS, "a select sees what a keep left"
    assert bounds["everything"] == 0


def test_of_blocks_only_the_best_are_opened(bounds) -> None:
    """Of 7 blocks of 4 pages the last holds recents; besides it and the one with the sink, one is opened."""
    assert bounds["blocks"] == 2 * (6 + 3 * 4) * BOUNDS


def test_blocks_are_scored_where_they_halve_the_work() -> None:
    for block, candidates, pages in itertools.product((2, 4, 8), (1, 2, 4), (5, 27, 28, 29, 60, 61, 199)):
        policy = SparsityConfig(select="quest", budget=160, sink=16, recent=16, block=block, candidates=candidates)
        counts = policy.page_counts(3200, 16)
        found, blocks = scored(policy, 3200, 16, pages), -(-pages // block)
        assert found <= pages
        if found < pages:
            opened = {0, *range((pages - counts.recents) // block, blocks)}  # those of sinks and of recents
            assert 2 * (blocks + counts.blocks * block) < pages
            every = [min(block, pages - block * place) for place in range(blocks)]
            largest = sum(every[place] for place in opened) + counts.blocks * block
            assert found == (pages - counts.recents) // block + largest
