"""Every keep with every select under a codec: the rules that hold for each of them hold for each pair.

Budgets that cover the sequence make a part disappear, a request gets in any batch and with any chunks what it gets
alone, pages are conserved in every step and after preemptions, and bytes fall as the policies say.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.sparsity.eviction import Keep
from sparsejax.sparsity.policy import PRESETS, SparsityConfig
from tests.engine.models import random_prompts, tiny_engine, warm_greedy

PROMPTS = random_prompts(8, (310, 90))
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
LONGEST = 512
NAMES = [preset.keep.method for preset in PRESETS.values() if preset.keep.beta == 1]  # pools of pyramids: test_pyramid
SMALL = {"budget": 150, "sink": 3, "recent": 12, "window": 12, "pool": 3, "interval": 12}
KEEPS = {name: Keep(name, **({} if name == "all" else SMALL)) for name in dict.fromkeys(NAMES)}
READ = {"budget": 64, "sink": 16, "recent": 16}
SELECTS = {
    "all": {},
    **{name: {"select": name, **READ} for name in ("window", "random", "oracle", "quest")},
    "strided": {"select": "strided", "stride": 2, **READ},
    "omnikv": {"select": "omnikv", "filter_layers": (0,), **READ},
    "turbo": {"select": "quest", "filter_layers": (0,), **READ},
    "every third step": {"select": "quest", "interval": 3, **READ},
    "top_p": {"select": "quest", "top_p": 0.5, **READ},
    "blocks": {"select": "quest", "block": 4, "candidates": 1, **READ},
}
PAIRS = list(itertools.product(KEEPS, SELECTS))


def policy(keep: str, select: str, keeps_all: bool = False, reads_all: bool = False) -> SparsityConfig:
    its = dataclasses.replace(KEEPS[keep], budget=LONGEST) if keeps_all else KEEPS[keep]
    return SparsityConfig(keep=its, **SELECTS[select] | ({"budget": LONGEST} if reads_all else {}))


def asking(*pair, **full) -> SamplingParams:
    return dataclasses.replace(GREEDY, sparsity=policy(*pair, **full))


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def engine_of(codec: str, **settings):
    declared = (codec, *(policy(keep, "all") for keep in KEEPS), *(policy("all", select) for select in SELECTS))
    return warm_greedy(tiny_engine(sparsity=declared, **{"max_num_seqs": 4, **settings}))


OTHERS = [pytest.param(codec, marks=pytest.mark.slow) for codec in ("dense", "int8", "fp8")]


@pytest.fixture(scope="module", params=["int4", *OTHERS])
def engine(request):
    with engine_of(request.param) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    """By pair and prompt; bytes that decode steps of the long prompt read, held and would hold if nothing left."""
    found, cost = {}, {}
    for pair in PAIRS:
        for place, prompt in enumerate(PROMPTS):
            before = engine.stats()
            found[*pair, place] = tokens(engine.generate(prompt, asking(*pair)))[0]
            kinds = ("read", "held", "dense")
            bytes_of = [engine.stats()[f"decode_{kind}_bytes"] - before[f"decode_{kind}_bytes"] for kind in kinds]
            cost.setdefault(pair, bytes_of)
    return found, cost


def test_a_part_whose_budget_covers_the_sequence_disappears(engine, alone):
    found, _ = alone
    requests, wanted = [], []
    for (keep, select), place in itertools.product(PAIRS, range(len(PROMPTS))):
        for keeps_all, reads_all in ((True, False), (False, True), (True, True)):
            requests.append((PROMPTS[place], asking(keep, select, keeps_all=keeps_all, reads_all=reads_all)))
            wanted.append(found["all" if keeps_all else keep, "all" if reads_all else select, place])
    assert tokens(engine.generate(*map(list, zip(*requests, strict=True)))) == wanted


def test_a_pair_gives_in_a_batch_of_all_what_it_gives_alone(engine, alone):
    found, before = alone[0], engine.stats()["compiles"]
    allocator = engine.core.scheduler.allocator
    order = [list(found)[place] for place in np.random.default_rng(0).permutation(len(found))]
    for index, (*pair, place) in enumerate(order):
        engine.add_request(str(index), PROMPTS[place], asking(*pair))
    answers = {}
    while engine.has_unfinished():
        answers |= {int(out.request_id): out.outputs[0].token_ids for out in engine.step() if out.finished}
        assert allocator.num_live + allocator.num_free == allocator.capacity
    assert [answers[index] for index in range(len(order))] == [found[key] for key in order]
    assert engine.stats()["compiles"] == before and allocator.num_live == 0
    assert len({tuple(answer) for (*_, place), answer in found.items() if place == 0}) > len(PAIRS) // 2, "all alike"


def test_chunks_change_nothing(engine, alone):
    """But where a value lies on the border of two codes: other chunks round its scale otherwise in the last bit, the
    code falls to its neighbour, and few of the answers notice."""
    codec = engine.config.sparsity[0]
    with engine_of(codec, max_num_batched_tokens=20) as other:
        answers = tokens(other.generate([PROMPTS[0]] * len(PAIRS), [asking(*pair) for pair in PAIRS]))
    differ = [pair for pair, answer in zip(PAIRS, answers, strict=True) if answer != alone[0][*pair, 0]]
    assert len(differ) <= (0 if codec == "dense" else 3), differ


def test_preemptions_disturb_nobody_and_lose_no_page(engine, alone):
    """A preempted request computes its output again as a prompt: under a select its later tokens may differ."""
    found, allocator = alone[0], engine.core.scheduler.allocator
    growing, long = random_prompts(7, (9,) * 3), dataclasses.replace(GREEDY, max_tokens=90)
    wanted, before = tokens(engine.generate(growing, long)), engine.stats()["num_preemptions"]
    pairs = list(itertools.product(KEEPS, ("all", "quest")))
    taken = allocator.allocate(allocator.num_free - 40)
    try:
        params = [long] * len(growing) + [asking(*pair) for pair in pairs]
        answers = tokens(engine.generate([*growing, *[PROMPTS[0]] * len(pairs)], params))
    finally:
        allocator.release(taken)
    assert answers[: len(growing)] == wanted and engine.stats()["num_preemptions"] > before
    for pair, answer in zip(pairs, answers[len(growing) :], strict=True):
        assert len(answer) == GREEDY.max_tokens and answer[0] == found[*pair, 0][0], pair
        assert pair[1] != "all" or answer == found[*pair, 0], pair
    assert allocator.num_live == 0


def test_bytes_are_those_of_both_parts(engine, alone):
    stats, group = engine.stats(), engine.core.runner.state.kv.group
    steps = GREEDY.max_tokens - 1
    dense = alone[1]["all", "all"]
    for (keep, select), (read, held, without) in alone[1].items():
        assert without == dense[0] == dense[2] and held == alone[1][keep, "all"][1], (keep, select)
        assert (held < without) == (keep != "all") and (read < held) == (select != "all"), (keep, select)
        if select in ("window", "strided", "random", "oracle", "quest", "blocks"):
            budget = (4 * stats["kv_page_bytes"]) if not group.row_bytes else 3 * group.page_bytes + group.row_bytes
            assert read <= steps * budget, (keep, select)
    arrays = jax.tree.leaves((engine.core.runner.state, engine.core.runner.params))
    assert engine.memory()["total"] == sum(array.nbytes for array in arrays)
