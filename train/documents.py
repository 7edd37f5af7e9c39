"""Training documents of an exact length: facts, filler, and questions with their answers.

Sentences and questions are those of the evaluation tasks. Each token of a document carries the weight of predicting
it, the task that it decides, and the target itself (after a full answer that is the end token, whatever follows).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsejax.evaluation.tasks import templates
from train.facts import KINDS, Fact, FactMaker, Question, merged
from train.lexicon import Lexicon

DECISION_WEIGHT = 4.0  # of a retrieved value
KEY_WEIGHT = 2.0  # of naming the next key


@dataclass(frozen=True)
class Mixture:
    """What documents are made of: weights per kind of fact, shares per document."""

    needle: float = 1.0
    pair: float = 1.0
    codes: float = 0.0
    chain: float = 0.0
    many: float = 0.0  # share of single questions that are asked together
    relation: float = 0.0
    recall: float = 0.5  # share of documents that are facts and bare answers only
    fresh: tuple[float, float] = (0.2, 0.7)  # range of a recall document's share of new facts
    interleave: float = 0.5  # share of documents whose questions may come right after their facts
    question_share: float = 0.45  # share of a document's tokens that questions may take
    max_questions: int = 24

    def weights(self) -> dict[str, float]:
        """Weights of the kinds of facts."""
        return {kind: getattr(self, kind) for kind in KINDS if kind != "many"}


class Document:
    """Lists that grow together, one entry per token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.kinds: list[int] = []
        self.targets: list[int] = []
        self.ending: int | None = None  # the target in place of the next token, whatever that is

    def add(self, tokens: list[int] | tuple[int, ...], weight: float = 0.0, kind: int = -1) -> None:
        """Append tokens; `weight` is that of predicting them."""
        self.tokens += tokens
        self.targets += tokens
        self.weights += [weight] * len(tokens)
        self.kinds += [kind] * len(tokens)
        if self.ending is not None and tokens:
            self.targets[-len(tokens)] = self.ending
            self.weights[-len(tokens)] = 1.0
            self.ending = None


class DocumentMaker:
    """Makes documents from a `random.Random`."""

    def __init__(self, lexicon: Lexicon, mixture: Mixture) -> None:
        self.lexicon, self.mixture = lexicon, mixture

    def make(self, rng: random.Random, length: int) -> Document:
        """A document that is `length` tokens long or slightly longer."""
        doc = Document()
        doc.add([self.lexicon.bos])
        facts = FactMaker(self.lexicon, rng, self._weights(rng))
        build = self._recalls if rng.random() < self.mixture.recall else self._questions
        build(rng, doc, facts, length)
        return doc

    def _weights(self, rng: random.Random) -> dict[str, float]:
        """Half of the documents have facts of one kind only."""
        weights = self.mixture.weights()
        if rng.random() < 0.5:
            return {rng.choices(list(weights), list(weights.values()))[0]: 1.0}
        return weights

    def _answer(self, rng: random.Random, doc: Document, question: Question, ask: bool = True) -> None:
        """Append a question with its answer, or the bare answer."""
        lex, number = self.lexicon, KINDS.index(question.kind)
        if ask:
            doc.add(question.prompt)
        order = list(range(len(question.answers)))
        if question.kind == "codes":
            rng.shuffle(order)
        for index, which in enumerate(order):
            if index == 0 or question.kind in ("codes", "many"):
                doc.add([lex.next] if index else [], 1.0)
                doc.add([question.keys[which]], KEY_WEIGHT if index else float(ask))
            doc.add([question.answers[which]], DECISION_WEIGHT, number)
        doc.add([lex.end], 1.0 if ask or len(order) > 1 else 0.0)
        if ask:
            doc.ending = lex.eos

    def _recalls(self, rng: random.Random, doc: Document, facts: FactMaker, length: int) -> None:
        """Facts with bare answers in between: many retrieval decisions per token."""
        known: list[Question] = []
        fresh = rng.uniform(*self.mixture.fresh)
        while len(doc.tokens) < length:
            if facts.more() and (not known or rng.random() < fresh):
                fact = facts.make()
                for sentence in fact.sentences:
                    doc.add(sentence)
                if fact.question.kind != "relation":
                    known.append(fact.question)
            elif known:
                self._answer(rng, doc, known.pop(rng.randrange(len(known))), ask=False)
            else:
                doc.add(self._filler(rng, self.lexicon.nouns))

    def _filler(self, rng: random.Random, nouns: list[int]) -> list[int]:
        lex, choice = self.lexicon, rng.choice
        if rng.random() < 0.04:
            middle = [choice(lex.adjectives) for _ in range(rng.randint(0, 40))]
            return [*lex.fill(" The"), *middle, choice(nouns), choice(lex.verbs), lex.end]
        slots = (choice(nouns), choice(lex.adjectives), choice(nouns), choice(lex.verbs), choice(lex.prepositions))
        return lex.fill(choice(templates.FILLERS), *slots)

    def _questions(self, rng: random.Random, doc: Document, facts: FactMaker, length: int) -> None:
        """Facts and filler in random order, with questions at the end or in between."""
        lex, mix = self.lexicon, self.mixture
        filler_share = rng.choice((0.0, 0.0, 0.5, 1.0))
        noisy = filler_share == 1.0 and rng.random() < 0.1
        subset = rng.sample(lex.nouns, rng.choice((24, 48, 400)))
        room, ask_room = length - 1, int(length * mix.question_share)
        wanted, used = rng.randint(1, mix.max_questions), 0
        asked: list[Fact] = []
        groups: list[list[list[int]]] = []
        while len(asked) < wanted and facts.more():
            fact = facts.make()
            size = sum(map(len, fact.sentences)) + len(fact.question.prompt) + 4 * len(fact.question.answers)
            if asked and used + size > ask_room or used + size > room:
                break
            used += size
            asked.append(fact)
            groups.append(fact.sentences)
        while used < room:
            if rng.random() < filler_share or not facts.more():
                sentences = [lex.noise] if noisy else [self._filler(rng, subset)]
            else:
                sentences = facts.make().sentences
            size = sum(map(len, sentences))
            if used + size > room:
                break
            used += size
            groups.append(sentences)
        self._write(rng, doc, groups, asked, rng.random() < mix.interleave)
        doc.add([lex.newline] * max(0, length - len(doc.tokens)))

    def _write(
        self, rng: random.Random, doc: Document, groups: list, asked: list[Fact], interleaved: bool
    ) -> None:
        """All sentences in random order (a group keeps its own), then the questions that were not asked yet."""
        slots = [index for index, group in enumerate(groups) for _ in group]
        rng.shuffle(slots)
        left = [len(group) for group in groups]
        late: list[Question] = []
        lines, lex = rng.random() < 0.3, self.lexicon
        for index, slot in enumerate(slots):
            starts = doc.ending is not None or (lines and index > 0)
            doc.add([lex.newline] if starts else [])
            sentence = groups[slot][-left[slot]]
            if (starts or index == 0) and rng.random() < 0.7:
                sentence = [lex.unspaced.get(sentence[0], sentence[0]), *sentence[1:]]
            doc.add(sentence)
            left[slot] -= 1
            if left[slot] == 0 and slot < len(asked):
                late.append(asked[slot].question)
            while interleaved and late and rng.random() < 0.15:
                self._answer(rng, doc, late.pop(rng.randrange(len(late))))
        rng.shuffle(late)
        for question in self._bundled(rng, late):
            self._answer(rng, doc, question)

    def _bundled(self, rng: random.Random, questions: list[Question]) -> list[Question]:
        """Some single questions joined into one question for several keys."""
        singles = [question for question in questions if question.kind in ("needle", "pair")]
        out = [question for question in questions if question.kind not in ("needle", "pair")]
        while singles:
            count = rng.randint(2, 4) if rng.random() < self.mixture.many else 1
            taken, singles = singles[:count], singles[count:]
            out.append(merged(self.lexicon, taken) if len(taken) > 1 else taken[0])
        rng.shuffle(out)
        return out
