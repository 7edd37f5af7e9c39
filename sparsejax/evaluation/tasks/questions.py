"""Question answering where the question is worded differently from the document."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsejax.errors import ConfigError
from sparsejax.evaluation.tasks import templates, words
from sparsejax.evaluation.tasks.compose import Plan
from sparsejax.evaluation.tasks.fillers import markov_filler
from sparsejax.evaluation.tasks.sample import Turn

PEOPLE = (
    "actor", "author", "baker", "captain", "doctor", "farmer",
    "king", "nurse", "pilot", "queen", "sailor", "tailor",
)
PLACES = (
    "attic", "barn", "cabin", "cellar", "garage", "kitchen",
    "library", "museum", "office", "school", "studio", "temple",
)


@dataclass(frozen=True)
class Relation:
    """A property of things: two ways to state it, two ways to ask for it, and the words it can take."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


RELATIONS = (
    Relation(
        (" The {thing} belongs to the {value}.", " The {thing} was bought by the {value}."),
        ("Who owns the {thing}?", "Who is the owner of the {thing}?"),
        PEOPLE,
    ),
    Relation(
        (" The {thing} is painted {value}.", " The {thing} has the color {value}."),
        ("What color has the {thing}?", "What is the color of the {thing}?"),
        words.COLORS,
    ),
    Relation(
        (" The {thing} was put into the {value}.", " The {thing} stands in the {value}."),
        ("Where is the {thing}?", "What place holds the {thing}?"),
        PLACES,
    ),
)


def question_answering(rng: random.Random, *, things: int = 6, hops: int = 1, turns: int = 1) -> Plan:
    """Things with an owner, a color and a place, stated one way and asked for another way.

    With two hops the question names the thing by its color (colors are unique then): both facts are needed.
    """
    if hops not in (1, 2):
        raise ConfigError(f"hops must be 1 or 2, not {hops}")
    if things > len(words.COLORS) or turns > things:
        raise ConfigError(f"use at most {len(words.COLORS)} things and no more turns than things")
    taken = {*PEOPLE, *PLACES, *words.COLORS}
    names = rng.sample([word for word in words.NOUNS if word not in taken], things)
    columns = [rng.sample(relation.values, things) for relation in RELATIONS]
    groups, asked = [], []
    for index, name in enumerate(names):
        wanted = rng.choice((0, 2)) if hops == 2 else rng.randrange(3)
        facts = [
            rng.choice(relation.statements).format(thing=name, value=columns[number][index])
            for number, relation in enumerate(RELATIONS)
        ]
        first = [wanted] if hops == 1 else [wanted, 1]
        order = first + [number for number in range(3) if number not in first]
        groups.append([[facts[number]] for number in order])
        called = name if hops == 1 else f"{columns[1][index]} thing"
        question = rng.choice(RELATIONS[wanted].questions).format(thing=called)
        asked.append((wanted, question, name, columns[wanted][index]))
    flat = [fact for group in groups for fact in group]
    made = tuple(
        Turn(f"\nQ: {question}\nA:", (answer,), frozenset(columns[wanted]), False, f" {name} {answer}{templates.END}\n")
        for wanted, question, name, answer in asked[:turns]
    )
    return Plan(flat, hops, lambda: made, markov_filler(rng))
