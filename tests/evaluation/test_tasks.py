"""Generators: exact lengths, one right answer, nothing to be gained from positions."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks import TASKS, Ask, make_sample
from tests.evaluation.tokenizers import tokenizer

NEEDLE = re.compile(r" The magic number for (\w+) is (\w+)\.")
PAIR = re.compile(r" (\w+): (\w+);")
CODE = re.compile(r" One code of (\w+) is (\w+)\.")
COPY = re.compile(r" Copy (\w+) to (\w+)\.")
ROOMY = {"compact": 400, "bytes": 1900}


@settings(max_examples=60, deadline=None)
@given(
    task=st.sampled_from(sorted(TASKS)),
    kind=st.sampled_from(sorted(ROOMY)),
    extra=st.integers(0, 300),
    seed=st.integers(0, 2**31),
)
def test_lengths_are_exact_and_replies_score(task: str, kind: str, extra: int, seed: int) -> None:
    made = make_sample(task, length=ROOMY[kind] + extra, seed=seed, tokenizer=tokenizer(kind))
    turn = made.turns[0]
    assert len(tokenizer(kind)(made.context + turn.prompt).input_ids) == ROOMY[kind] + extra
    assert turn.score(turn.reply) and turn.recall(turn.reply) == 1.0
    assert not turn.score("") and not turn.score("I do not know.")
    others = sorted(turn.choices - set(turn.answers))
    if others:
        assert not turn.score(f"{turn.reply.strip()} {others[0]}")
    whole = made.context + turn.prompt
    assert made.asks("Q+") == made.asks("LD") == (Ask(whole, whole, turn),)
    assert made.asks("Q-") == made.asks("MT")[:1] == (Ask(whole, made.context, turn),)
    assert all(0.0 <= depth <= 1.0 for depth in made.depths)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_same_seed_same_text(task: str) -> None:
    one, two, other = (make_sample(task, length=512, seed=seed, tokenizer=tokenizer("compact")) for seed in (3, 3, 4))
    assert one == two
    assert one.context != other.context


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize(("template", "pattern"), [("needle", NEEDLE), ("pair", PAIR)])
def test_a_key_has_one_value(template: str, pattern: re.Pattern, density: float) -> None:
    for seed in range(20):
        made = make_sample(
            "niah_dense", length=768, seed=seed, tokenizer=tokenizer("compact"), template=template, density=density
        )
        facts = pattern.findall(made.context)
        keys, values = zip(*facts, strict=True)
        assert len(set(keys)) == len(keys) and len(set(values)) == len(values)
        (answer,), asked = made.turns[0].answers, made.turns[0].prompt.rsplit("?", 1)[0].split()[-1]
        assert dict(facts)[asked] == answer
        assert set(values) == set(made.turns[0].choices)


def test_several_values_and_several_keys() -> None:
    for seed in range(10):
        made = make_sample("niah_multivalue", length=512, seed=seed, tokenizer=tokenizer("compact"))
        (asked,) = {key for key, _ in CODE.findall(made.context)}
        assert f" {asked}?" in made.turns[0].prompt
        assert {value for _, value in CODE.findall(made.context)} == set(made.turns[0].answers)
        many = make_sample("niah_multiquery", length=512, seed=seed, tokenizer=tokenizer("compact"))
        asked = re.search(r"of (.*)\.", many.turns[0].prompt)[1].split(", ")
        facts = dict(NEEDLE.findall(many.context))
        assert tuple(facts[key] for key in asked) == many.turns[0].answers


def test_chains_can_be_followed_in_order() -> None:
    for seed in range(10):
        made = make_sample("vt", length=512, seed=seed, tokenizer=tokenizer("compact"), chains=3, hops=4, turns=3)
        links = COPY.findall(made.context)
        for turn in made.turns:
            holding = [turn.prompt.rsplit("?", 1)[0].split()[-1]]
            for source, target in links:
                if source == holding[-1]:
                    holding.append(target)
            assert tuple(holding[1:]) == turn.answers


def test_common_words_are_the_most_common_at_every_length() -> None:
    for length in (256, 1024, 4096):
        made = make_sample("cwe", length=length, seed=1, tokenizer=tokenizer("compact"))
        counts = Counter(made.context.removeprefix("Words:").split())
        found = {word for word, _ in counts.most_common(3)}
        assert found == set(made.turns[0].answers)
        assert counts.most_common(4)[3][1] < min(counts[word] for word in found)


def test_frequent_words_follow_the_noise_word() -> None:
    for seed in range(10):
        made = make_sample("fwe", length=512, seed=seed, tokenizer=tokenizer("compact"))
        counts = Counter(word for word in made.context.split() if word in made.turns[0].choices)
        assert [word for word, _ in counts.most_common(3)] == list(made.turns[0].answers)


def test_question_answering_is_worded_differently() -> None:
    for seed in range(20):
        for task in ("qa", "qa_two_hops"):
            made = make_sample(task, length=512, seed=seed, tokenizer=tokenizer("compact"))
            question = made.turns[0].prompt.split("Q: ")[1].split("?")[0]
            assert question not in made.context
            assert made.turns[0].answers[0] in made.turns[0].choices


@pytest.mark.parametrize("task", ["niah_multikey", "niah_dense", "kv", "niah_multiquery", "vt_multichain"])
def test_a_guesser_of_a_constant_position_is_at_chance(task: str) -> None:
    """Whichever tenth of the document is guessed, the asked fact lies there about a tenth of the time."""
    count = 300
    first = Counter(
        min(9, int(10 * make_sample(task, length=384, seed=seed, tokenizer=tokenizer("compact")).depths[0]))
        for seed in range(count)
    )
    if task in ("niah_multiquery", "vt_multichain"):  # depths are sorted: the first of several lies early
        assert max(first.values()) < 0.5 * count
    else:
        chi_square = sum((first[part] - count / 10) ** 2 / (count / 10) for part in range(10))
        assert chi_square < 33.7  # 0.9999 quantile, 9 degrees of freedom


@pytest.mark.parametrize("keys", [4, 8])
def test_a_guesser_of_a_constant_rank_is_at_chance(keys: int) -> None:
    """Naming the value of the k-th fact is right once in `keys` documents, for every k."""
    count, right = 320, Counter()
    for seed in range(count):
        made = make_sample("niah_multikey", length=384, seed=seed, tokenizer=tokenizer("compact"), keys=keys)
        values = [value for _, value in NEEDLE.findall(made.context)]
        assert len(values) == keys
        right[values.index(made.turns[0].answers[0])] += 1
    expected = count / keys
    assert sum((right[rank] - expected) ** 2 / expected for rank in range(keys)) < 30.0


def test_bad_requests_say_what_to_do() -> None:
    known = tokenizer("compact")
    with pytest.raises(ConfigError, match="known are"):
        make_sample("nothing", length=64, seed=0, tokenizer=known)
    with pytest.raises(ConfigError, match="greater length"):
        make_sample("niah_multikey", length=24, seed=0, tokenizer=known)
    with pytest.raises(ConfigError, match="queries"):
        make_sample("niah_single", length=256, seed=0, tokenizer=known, queries=2)
    with pytest.raises(ConfigError, match="filler"):
        make_sample("niah_single", length=256, seed=0, tokenizer=known, filler="lorem")
    with pytest.raises(ConfigError, match="protocol"):
        make_sample("niah_single", length=256, seed=0, tokenizer=known).asks("Q")
