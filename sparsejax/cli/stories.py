"""Short documents with facts to look up: the demo's prompts, in words that the embedded model knows."""

from __future__ import annotations

import random
from dataclasses import dataclass

FILLERS = (
    " The {adjective} {noun} {verb} {where} the {other}.",
    " The {noun} {verb} {where} the {adjective} {other}.",
    " A {adjective} {noun} is {where} the {other}.",
)
FACT = " The magic number for {noun} is {value}."
QUESTION = "\nQ: What is the magic number for {noun}?\nA:"
NOUNS = (
    "anchor apple basket bell bridge candle castle clock coin compass cottage drum feather forest fountain "
    "garden gate harbor harp island kettle ladder lantern lighthouse market meadow mirror mountain orchard "
    "parcel pillow river saddle shovel teapot tower trumpet valley violin wagon whistle window"
).split()
ADJECTIVES = (
    "old quiet bright narrow gentle brave plain humble smooth golden wooden rusty modest hidden".split()
)
VERBS = "rests stands waits sleeps turns leans shines".split()
PLACES = "near behind beside under above beyond below past".split()


@dataclass(frozen=True)
class Story:
    """A document, a question about one of its facts, and what the right answer names."""

    text: str
    noun: str
    value: str

    @property
    def prompt(self) -> str:
        return self.text + QUESTION.format(noun=self.noun)

    def answered_by(self, reply: str) -> bool:
        """Whether the first line of a reply names the right number and no other."""
        line = reply.strip().partition("\n")[0]
        return [word for word in line.replace(".", " ").split() if word.isdigit()] == [self.value]


def story(seed: int, sentences: int, facts: int = 4) -> Story:
    """A document of so many sentences, some of them facts, in random order; always the same for one seed."""
    draw = random.Random(seed)
    nouns, values = draw.sample(NOUNS, facts), draw.sample(range(100, 1000), facts)
    parts = [FACT.format(noun=noun, value=value) for noun, value in zip(nouns, values, strict=True)]
    parts += [filler(draw) for _ in range(sentences - facts)]
    draw.shuffle(parts)
    return Story("".join(parts), nouns[0], str(values[0]))


def filler(draw: random.Random) -> str:
    noun, other = draw.sample(NOUNS, 2)
    return draw.choice(FILLERS).format(
        adjective=draw.choice(ADJECTIVES),
        noun=noun,
        verb=draw.choice(VERBS),
        where=draw.choice(PLACES),
        other=other,
    )
