"""What a task hands out: a context, questions about it, and exact scoring of replies."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsejax.errors import ConfigError

PROTOCOLS = ("Q+", "Q-", "MT", "LD")
LATER = frozenset({"Q-", "MT"})
"""Protocols that compress before any question is read."""


@dataclass(frozen=True)
class Turn:
    """One question and what counts as its answer.

    Attributes:
        prompt: text that follows the context (or the reply before it) and ends where the reply begins.
        answers: the expected items. All of them, and no other of `choices`, must be named.
        choices: every item of the context that could be taken for an answer.
        ordered: whether the order of `answers` counts.
        reply: a correct reply as the training data would write it.
    """

    prompt: str
    answers: tuple[str, ...]
    choices: frozenset[str]
    ordered: bool
    reply: str

    def found(self, text: str) -> tuple[str, ...]:
        """The choices that the first line of a reply names as whole words, in order, each once."""
        line = text.strip().split("\n", 1)[0]
        named = re.findall(r"\w+", line.lower())
        return tuple(dict.fromkeys(word for word in named if word in self.choices))

    def score(self, text: str) -> bool:
        """True if the reply names exactly the expected items."""
        found = self.found(text)
        return found == self.answers if self.ordered else set(found) == set(self.answers)

    def recall(self, text: str) -> float:
        """Share of the expected items that the reply names (partial credit, as RULER counts it)."""
        found = set(self.found(text))
        return sum(answer in found for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class Ask:
    """One request of a protocol.

    Attributes:
        text: everything up to where the reply begins.
        head: the start of `text` after which the cache is compressed, before the rest is read.
        turn: the question that `text` ends with.
    """

    text: str
    head: str
    turn: Turn


@dataclass(frozen=True)
class Sample:
    """One document of a task with its questions.

    Attributes:
        task: name of the task.
        seed: the seed that made it, with `task` and `length`.
        length: tokens of ``context + turns[0].prompt`` with special tokens, under the tokenizer it was made for.
        context: the document.
        turns: questions about it; protocols other than MT use the first only.
        depths: relative position in the context, 0 to 1, of each fact that the first question needs.
    """

    task: str
    seed: int
    length: int
    context: str
    turns: tuple[Turn, ...]
    depths: tuple[float, ...]

    def asks(self, protocol: str) -> tuple[Ask, ...]:
        """What to serve under a protocol, one request per question.

        ``Q+``: the question is part of what gets compressed, so a method may keep what it needs. ``Q-``: the document
        is compressed before the question is read. ``MT``: as ``Q-`` for every question, each after the earlier ones
        with their correct replies, all on the same compressed document. ``LD``: as ``Q+`` where the reply is long, so
        that what is read and kept changes while it is made.

        Raises:
            ConfigError: there is no such protocol.
        """
        if protocol not in PROTOCOLS:
            raise ConfigError(f"protocol {protocol!r} is unknown; use one of {', '.join(PROTOCOLS)}")
        asks, text = [], self.context
        for turn in self.turns if protocol == "MT" else self.turns[:1]:
            text += turn.prompt
            asks.append(Ask(text, self.context if protocol in LATER else text, turn))
            text += turn.reply.removesuffix("\n")
        return tuple(asks)
