"""Weaving facts into filler up to an exact number of tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks import words
from sparsejax.evaluation.tasks.fillers import Filler, padding_sentence
from sparsejax.evaluation.tasks.sample import Sample, Turn

Count = Callable[[str], int]


@dataclass(frozen=True)
class Plan:
    """A task's document before it has a length.

    Attributes:
        groups: facts; each is its sentences in the order that they must keep.
        needed: how many of the first groups the first question asks for.
        turns: makes the questions; called at the end, when all facts that filler may have added are known.
        filler: makes one filler sentence.
        intro: text before everything else.
    """

    groups: Sequence[Sequence[str]]
    needed: int
    turns: Callable[[], tuple[Turn, ...]]
    filler: Filler
    intro: str = ""


def token_counter(tokenizer: Any) -> Count:
    """Tokens of a text, special tokens included, for a transformers tokenizer."""
    return lambda text: len(tokenizer(text).input_ids)


def weave(rng: random.Random, groups: Sequence[Sequence[str]], filler: Sequence[str]) -> list[tuple[str, int]]:
    """Sentences in random order with the number of their group (-1 for filler); a group keeps its inner order.

    Every arrangement of the slots is equally likely, so no place in the document says anything about the answer.
    """
    slots = [index for index, group in enumerate(groups) for _ in group] + [-1] * len(filler)
    rng.shuffle(slots)
    queues = [iter(group) for group in groups]
    rest = iter(filler)
    return [(next(queues[slot] if slot >= 0 else rest), slot) for slot in slots]


def compose(task: str, seed: int, length: int, plan: Plan, rng: random.Random, count: Count) -> Sample:
    """A sample whose context and first question have exactly `length` tokens."""
    prompt = plan.turns()[0].prompt
    facts = "".join(sentence for group in plan.groups for sentence in group)
    if count(plan.intro + facts + padding_sentence(rng) + prompt) > length:
        raise ConfigError(
            f"task {task!r} has facts and a question that alone exceed {length} tokens; ask for a greater length "
            "or for fewer facts"
        )
    filler: list[str] = []
    low = count(plan.intro + facts + prompt)
    while low < length:
        filler.append(plan.filler())
        low += max(1, count(filler[-1]) - count(""))
    costs = _word_costs(count)
    while True:
        sentences = weave(rng, plan.groups, filler)
        place = rng.randint(0, len(sentences))
        before, after = sentences[:place], sentences[place:]
        context = _pad(rng, costs, plan.intro, before, after, prompt, length, count)
        if context is not None:
            break
        if not filler:
            raise ConfigError(f"task {task!r} cannot be made exactly {length} tokens long with this tokenizer")
        filler.pop()
    present = frozenset(re.findall(r"\w+", context))
    turns = tuple(replace(turn, choices=turn.choices & present) for turn in plan.turns())
    return Sample(task, seed, length, context, turns, _depths(sentences, plan.needed))


def _word_costs(count: Count) -> dict[int, list[str]]:
    """Adjectives by the number of tokens that each adds to a sentence."""
    bare = count(" The thing.")
    costs: dict[int, list[str]] = {}
    for word in words.ADJECTIVES:
        costs.setdefault(count(f" The {word} thing.") - bare, []).append(word)
    return {cost: found for cost, found in costs.items() if cost > 0}


def _stretch(rng: random.Random, costs: dict[int, list[str]], tokens: int) -> list[str] | None:
    """Adjectives that add `tokens` tokens in all, or None where no combination does."""
    ways: list[list[int]] = [[]]
    for total in range(1, tokens + 1):
        ways.append([cost for cost in costs if cost <= total and (cost == total or ways[total - cost])])
    out: list[str] = []
    while tokens > 0:
        if not ways[tokens]:
            return None
        cost = rng.choice(ways[tokens])
        out.append(rng.choice(costs[cost]))
        tokens -= cost
    return out


def _pad(
    rng: random.Random,
    costs: dict[int, list[str]],
    intro: str,
    before: list[tuple[str, int]],
    after: list[tuple[str, int]],
    prompt: str,
    length: int,
    count: Count,
) -> str | None:
    """The context with one padding sentence that makes the length exact, or None where there is no such sentence."""
    head = intro + "".join(sentence for sentence, _ in before)
    tail = "".join(sentence for sentence, _ in after)
    wanted = length - count(head + padding_sentence(rng) + tail + prompt)
    for _ in range(8):
        adjectives = _stretch(rng, costs, wanted) if wanted >= 0 else None
        if adjectives is None:
            return None
        context = head + padding_sentence(rng, adjectives) + tail
        missing = length - count(context + prompt)
        if missing == 0:
            return context
        wanted += missing
    return None


def _depths(sentences: list[tuple[str, int]], needed: int) -> tuple[float, ...]:
    last = max(1, len(sentences) - 1)
    return tuple(index / last for index, (_, group) in enumerate(sentences) if 0 <= group < needed)
