"""Token ids of words and sentence templates under the compact vocabulary."""

from __future__ import annotations

import re
from functools import cache

from sparsejax.evaluation.tasks import questions, templates, words
from train.vocabulary import BOS, EOS, build_tokenizer

SLOT = re.compile(r"\{(\d)\}")


class Lexicon:
    """Ids of every word list, and templates compiled to ids with slots."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer()
        self.vocab_size = tokenizer.get_vocab_size()
        self.bos, self.eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.nouns = self.words(words.NOUNS)
        self.adjectives = self.words(words.ADJECTIVES)
        self.verbs = self.words(words.VERBS)
        self.prepositions = self.words(words.PREPOSITIONS)
        self.values = self.words(words.VALUES)
        self.newline, self.end, self.next = (self._encode(text)[0] for text in ("\n", templates.END, templates.NEXT))
        pairs = [(self._encode(f" {word}"), self._encode(word)) for word in words.LINE_STARTERS]
        self.unspaced = {spaced[0]: bare[0] for spaced, bare in pairs if len(spaced) == len(bare) == 1}
        self.relations = [
            (
                [one.format(thing="{0}", value="{1}").replace(" {", "{") for one in relation.statements],
                ["\nQ: " + one.format(thing="{0}").replace(" {", "{") + "\nA:" for one in relation.questions],
                self.words(relation.values),
            )
            for relation in questions.RELATIONS
        ]
        taken = {token for relation in self.relations for token in relation[2]}
        self.things = frozenset(self.nouns) - taken
        self.noise = self._encode(templates.NOISE)

    def words(self, items: tuple[str, ...]) -> list[int]:
        """Ids of words that must each be one token."""
        return [one for (one,) in (self._encode(f" {item}") for item in items)]

    @cache  # noqa: B019  (a Lexicon lives as long as the process)
    def compiled(self, template: str) -> tuple[int, ...]:
        """Ids of a template, slot ``{k}`` as ``-1 - k``."""
        out: list[int] = []
        for index, part in enumerate(SLOT.split(template)):
            out += [-1 - int(part)] if index % 2 else self._encode(part) if part else []
        return tuple(out)

    def fill(self, template: str, *slots: int) -> list[int]:
        """Ids of a template with its slots filled by position."""
        return [slots[-1 - token] if token < 0 else token for token in self.compiled(template)]
