"""Filler text between the facts of a task."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks import templates, words

Filler = Callable[[], str]


def noise_filler() -> Filler:
    """The same five sentences again and again: trivially compressible, kept for comparison with the field."""
    sentences = [f" {part.strip()}." for part in templates.NOISE.strip().rstrip(".").split(".")]
    turn = iter(range(10**9))
    return lambda: sentences[next(turn) % len(sentences)]


def markov_filler(rng: random.Random, *, nouns: int = 48, fan_out: int = 3) -> Filler:
    """Sentences whose words follow a random order-2 transition table of this document's own.

    Nouns are those that facts use as keys, so a word alone never gives a fact away.
    """
    pool = rng.sample(words.NOUNS, min(nouns, len(words.NOUNS)))
    table: dict[tuple[str, str], list[str]] = {}
    state = (rng.choice(pool), rng.choice(pool))

    def following() -> str:
        nonlocal state
        options = table.setdefault(state, rng.sample(pool, min(fan_out, len(pool))))
        state = (state[1], rng.choice(options))
        return state[1]

    def sentence() -> str:
        slots = (following(), rng.choice(words.ADJECTIVES), following(), rng.choice(words.VERBS))
        template = rng.choice(templates.FILLERS)
        return template.format(*(f" {slot}" for slot in (*slots, rng.choice(words.PREPOSITIONS))))

    return sentence


def needle_filler(rng: random.Random, template: str, keys: list[str], values: list[str], share: float) -> Filler:
    """Facts of the asked kind with other keys and values, a `share` of the sentences; the rest is Markov filler."""
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"the share of facts among filler must be in (0, 1], not {share}")
    other = markov_filler(rng)

    def sentence() -> str:
        if rng.random() < share and keys and values:
            return template.format(f" {keys.pop()}", f" {values.pop()}")
        return other()

    return sentence


def padding_sentence(rng: random.Random, adjectives: Sequence[str] = ()) -> str:
    """A filler sentence stretched by adjectives; makes lengths exact."""
    stretch = "".join(f" {adjective}" for adjective in adjectives)
    return f" The{stretch} {rng.choice(words.NOUNS)} {rng.choice(words.VERBS)}."
