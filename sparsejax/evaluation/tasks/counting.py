"""Aggregation tasks: common words, frequent words and the copy of a list (long decode)."""

from __future__ import annotations

import random
import string
from itertools import islice

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks import templates, words
from sparsejax.evaluation.tasks.compose import Plan
from sparsejax.evaluation.tasks.fillers import markov_filler
from sparsejax.evaluation.tasks.sample import Turn

NUMBERS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def common_words(rng: random.Random, *, common: int = 3, often: int = 12, seldom: int = 2) -> Plan:
    """A list of words: `common` of them stand in it `often` times, all others `seldom` times; which are common?"""
    pool = rng.sample(words.NOUNS, len(words.NOUNS))
    answers, others = tuple(pool[:common]), pool[common:]
    groups = [[f" {word}"] for word in answers for _ in range(often)]
    waiting: list[str] = []
    fresh = iter(others)
    rounds = 1

    def filler() -> str:
        nonlocal fresh, rounds
        if not waiting:
            batch = list(islice(fresh, 24))
            if not batch:
                fresh, rounds = iter(others), rounds + 1
                if seldom * rounds >= often:
                    raise ConfigError(
                        "there are not enough words for this length; let the common words stand more often"
                    )
                batch = list(islice(fresh, 24))
            waiting.extend(batch * seldom)
            rng.shuffle(waiting)
        return f" {waiting.pop()}"

    turn = Turn(
        templates.ASK_COMMON.format(f" {NUMBERS[common]}"),
        answers,
        frozenset(words.NOUNS),
        False,
        f" {' '.join(answers)}{templates.END}\n",
    )
    return Plan(groups, len(groups), lambda: (turn,), filler, "Words:")


def frequent_words(rng: random.Random, *, frequent: int = 3, most: int = 16, letters: int = 4) -> Plan:
    """Coded words of random letters whose counts fall as ``rank ** -2``; which follow the most frequent one?

    As in RULER the most frequent word is noise (``...``) and the next `frequent` are asked for. Their counts differ by
    at least one, and every other word is rarer than each of them.
    """
    made: set[str] = set()

    def word() -> str:
        while (fresh := "".join(rng.choices(string.ascii_lowercase, k=letters))) in made:
            pass
        made.add(fresh)
        return fresh

    answers = tuple(word() for _ in range(frequent))
    counts = [max(round(most / (rank * rank)), 2 + frequent - rank) for rank in range(1, frequent + 1)]
    groups = [[f" {answer}"] for answer, count in zip(answers, counts, strict=True) for _ in range(count)]

    def filler() -> str:
        return " ..." if rng.random() < 0.7 else f" {word()}"

    def ask() -> tuple[Turn, ...]:
        prompt = templates.ASK_FREQUENT.format(f" {NUMBERS[frequent]}")
        reply = f" {' '.join(answers)}{templates.END}\n"
        return (Turn(prompt, answers, frozenset(made), False, reply),)

    return Plan(groups, len(groups), ask, filler, "Coded words:")


def copy_list(rng: random.Random, *, items: int = 32) -> Plan:
    """A list of words somewhere in filler, to be copied in full: the reply is long while the context is compressed."""
    listed = tuple(rng.sample(words.NOUNS, items))
    text = " List:" + templates.NEXT.join(f" {word}" for word in listed) + templates.END
    turn = Turn(
        templates.ASK_COPY,
        listed,
        frozenset(words.NOUNS),
        True,
        templates.NEXT.join(f" {word}" for word in listed) + templates.END + "\n",
    )
    return Plan([[text]], 1, lambda: (turn,), markov_filler(rng))
