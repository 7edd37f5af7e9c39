"""Facts of training documents: the sentences that state them and the questions that ask for them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsejax.evaluation.tasks import templates
from train.lexicon import Lexicon

KINDS = ("needle", "pair", "codes", "chain", "many", "relation")


@dataclass(frozen=True)
class Question:
    """What is asked (`prompt` ids) and the reply: `lead` comes first, then `answers`.

    For ``codes`` and ``many`` every answer follows its key; otherwise answers simply follow each other.
    """

    kind: str
    prompt: tuple[int, ...]
    keys: tuple[int, ...]
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Fact:
    """Sentences in the order that they keep, and what can be asked."""

    sentences: list[list[int]]
    question: Question


class FactMaker:
    """Makes facts of one document; no key and no value is used twice."""

    def __init__(self, lexicon: Lexicon, rng: random.Random, weights: dict[str, float]) -> None:
        self.lexicon, self.rng = lexicon, rng
        self.keys = rng.sample(lexicon.nouns, len(lexicon.nouns))
        self.values = rng.sample(lexicon.values, len(lexicon.values))
        self.columns = [rng.sample(values, len(values)) for _, _, values in lexicon.relations]
        self.kinds = [kind for kind in KINDS if kind != "many" and weights.get(kind, 0.0) > 0.0]
        self.weights = [weights[kind] for kind in self.kinds]

    def more(self) -> bool:
        """Whether keys and values for another fact are left."""
        return len(self.keys) > 8 and len(self.values) > 8

    def make(self) -> Fact:
        """A fact of a random kind."""
        kind = self.rng.choices(self.kinds, self.weights)[0]
        if kind == "relation" and not all(self.columns):
            kind = "needle"
        return getattr(self, f"_{kind}")()

    def _single(self, kind: str, statement: str, ask: str) -> Fact:
        key, value = self.keys.pop(), self.values.pop()
        fill = self.lexicon.fill
        return Fact([fill(statement, key, value)], Question(kind, tuple(fill(ask, key)), (key,), (value,)))

    def _needle(self) -> Fact:
        return self._single("needle", templates.NEEDLE, templates.ASK_NEEDLE)

    def _pair(self) -> Fact:
        return self._single("pair", templates.PAIR, templates.ASK_PAIR)

    def _codes(self) -> Fact:
        key, fill = self.keys.pop(), self.lexicon.fill
        found = tuple(self.values.pop() for _ in range(self.rng.randint(2, 4)))
        sentences = [fill(templates.CODE, key, value) for value in found]
        return Fact(sentences, Question("codes", tuple(fill(templates.ASK_CODES, key)), (key,) * len(found), found))

    def _chain(self) -> Fact:
        value, fill = self.values.pop(), self.lexicon.fill
        names = tuple(self.keys.pop() for _ in range(self.rng.randint(2, 4)))
        hops = [fill(templates.ASSIGN, one, two) for one, two in zip((value, *names), names, strict=False)]
        return Fact(hops, Question("chain", tuple(fill(templates.ASK_CHAIN, value)), (value,), names))

    def _relation(self) -> Fact:
        rng, lex = self.rng, self.lexicon
        while (thing := self.keys.pop()) not in lex.things:
            pass
        values = [column.pop() for column in self.columns]
        sentences = [
            lex.fill(rng.choice(statements), thing, value)
            for (statements, _, _), value in zip(lex.relations, values, strict=True)
        ]
        rng.shuffle(sentences)
        by_color = rng.random() < 0.3
        wanted = rng.choice((0, 2)) if by_color else rng.randrange(3)
        ask = rng.choice(lex.relations[wanted][1])
        if by_color:
            ask = ask.replace("{0}", "{0} thing")
        prompt = lex.fill(ask, values[1] if by_color else thing)
        return Fact(sentences, Question("relation", tuple(prompt), (thing,), (values[wanted],)))


def merged(lexicon: Lexicon, questions: list[Question]) -> Question:
    """One question for several keys at once."""
    keys = [question.keys[0] for question in questions]
    before, after = templates.ASK_MANY.split("{0}")
    prompt = lexicon.fill(before)
    for index, key in enumerate(keys):
        prompt += [lexicon.next, key] if index else [key]
    prompt += lexicon.fill(after)
    return Question("many", tuple(prompt), tuple(keys), tuple(question.answers[0] for question in questions))
