"""Training documents as token ids, made on the fly from a seed.

A document is facts, filler and questions with answers, cut or padded to an exact length. `loss` weights say which
tokens are learned: answers (the retrieval decisions most), a little of everything else.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparsejax.evaluation.tasks import templates, words
from train.vocabulary import BOS, build_tokenizer

DECISION_WEIGHT = 4.0
SLOT = re.compile(r"\{(\d)\}")


class Lexicon:
    """Token ids of words and templates under the compact vocabulary."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer()
        self.vocab_size = tokenizer.get_vocab_size()
        self.bos = tokenizer.token_to_id(BOS)
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.nouns = self._words(words.NOUNS)
        self.adjectives = self._words(words.ADJECTIVES)
        self.verbs = self._words(words.VERBS)
        self.prepositions = self._words(words.PREPOSITIONS)
        self.values = self._words(words.VALUES)
        self.newline = self._encode("\n")[0]
        self.end = self._encode(templates.END)[0]
        self.next = self._encode(templates.NEXT)[0]

    def _words(self, items: tuple[str, ...]) -> list[int]:
        ids = [self._encode(f" {item}") for item in items]
        return [one for (one,) in ids]

    @lru_cache(maxsize=None)  # noqa: B019  (a Lexicon lives as long as the process)
    def compiled(self, template: str) -> tuple[int, ...]:
        """Ids of a template, slot ``{k}`` as ``-1 - k``."""
        out: list[int] = []
        for index, part in enumerate(SLOT.split(template)):
            out += [-1 - int(part)] if index % 2 else self._encode(part) if part else []
        return tuple(out)

    def fill(self, template: str, *slots: int) -> list[int]:
        return [slots[-1 - token] if token < 0 else token for token in self.compiled(template)]


@dataclass(frozen=True)
class Mixture:
    """What documents are made of. Shares are probabilities per document or weights per fact kind."""

    needle: float = 1.0
    pair: float = 1.0
    codes: float = 0.0
    chain: float = 0.0
    recall: float = 0.5  # share of documents that are facts and recalls only
    bare: float = 0.0  # share of the recall documents that are plain records ``key value;``
    fresh: tuple[float, float] = (0.2, 0.7)  # range of a recall document's share of new facts
    interleave: float = 0.5  # share of documents whose questions follow their fact at once or later
    question_share: float = 0.45  # share of a document's tokens that questions may take
    max_questions: int = 24
    nouns: int = 10**6  # only the first so many nouns and values are used as keys and values
    values: int = 10**6

    def weights(self) -> list[float]:
        return [self.needle, self.pair, self.codes, self.chain]


KINDS = ("needle", "pair", "codes", "chain")


class Document:
    """Token and weight lists that grow together."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.weights: list[float] = []
        self.kinds: list[int] = []

    def add(self, tokens: list[int], weight: float = 0.0, kind: int = -1) -> None:
        self.tokens += tokens
        self.weights += [weight] * len(tokens)
        self.kinds += [kind] * len(tokens)


class DocumentMaker:
    """Makes documents of an exact length from a `random.Random`."""

    def __init__(self, lexicon: Lexicon, mixture: Mixture) -> None:
        self.lexicon, self.mixture = lexicon, mixture
        self.keys, self.values = lexicon.nouns[: mixture.nouns], lexicon.values[: mixture.values]

    def filler(self, rng: random.Random, nouns: list[int]) -> list[int]:
        lex, choice = self.lexicon, rng.choice
        return lex.fill(
            choice(templates.FILLERS),
            choice(nouns),
            choice(lex.adjectives),
            choice(nouns),
            choice(lex.verbs),
            choice(lex.prepositions),
        )

    def facts(self, rng: random.Random, kind: str, keys: list[int], values: list[int]) -> tuple[list[list[int]], tuple]:
        """Sentences of one fact group in document order, and its question ``(kind, key, answers)``."""
        fill = self.lexicon.fill
        if kind == "needle":
            key, value = keys.pop(), values.pop()
            return [fill(templates.NEEDLE, key, value)], (kind, key, (value,))
        if kind == "pair":
            key, value = keys.pop(), values.pop()
            return [fill(templates.PAIR, key, value)], (kind, key, (value,))
        if kind == "codes":
            key, found = keys.pop(), tuple(values.pop() for _ in range(rng.randint(2, 4)))
            return [fill(templates.CODE, key, value) for value in found], (kind, key, found)
        value, names = values.pop(), tuple(keys.pop() for _ in range(rng.randint(2, 4)))
        hops = [fill(templates.ASSIGN, *pair) for pair in zip((value, *names), names, strict=False)]
        return hops, (kind, value, names)

    def answer(self, rng: random.Random, doc: Document, question: tuple, ask: bool = True) -> None:
        """Append a question with its answer, or the bare answer (a recall)."""
        kind, key, found = question
        fill, number = self.lexicon.fill, KINDS.index(kind)
        if ask:
            asks = (templates.ASK_NEEDLE, templates.ASK_PAIR, templates.ASK_CODES, templates.ASK_CHAIN)
            doc.add(fill(asks[number], key))
        doc.add([key], 1.0 if ask else 0.0)
        if kind == "codes":
            found = rng.sample(found, len(found))
            for index, value in enumerate(found):
                if index:
                    doc.add([self.lexicon.next, key], 1.0)
                doc.add([value], DECISION_WEIGHT, number)
        else:
            for value in found:
                doc.add([value], DECISION_WEIGHT, number)
        doc.add([self.lexicon.end], 1.0 if ask or kind in ("codes", "chain") else 0.0)

    def make(self, rng: random.Random, length: int) -> tuple[list[int], list[float], list[int]]:
        doc = Document()
        doc.add([self.lexicon.bos])
        if rng.random() < self.mixture.recall:
            if rng.random() < self.mixture.bare:
                self._records(rng, doc, length)
            else:
                self._recalls(rng, doc, length)
        else:
            self._questions(rng, doc, length)
        return doc.tokens[:length], doc.weights[:length], doc.kinds[:length]

    def _pick_kinds(self, rng: random.Random) -> list[float]:
        weights = self.mixture.weights()
        if rng.random() < 0.5:
            one = rng.choices(range(4), weights)[0]
            return [float(index == one) for index in range(4)]
        return weights

    def _recalls(self, rng: random.Random, doc: Document, length: int) -> None:
        """Facts with bare answers in between: many retrieval decisions per token."""
        lex = self.lexicon
        keys, values = rng.sample(self.keys, len(self.keys)), rng.sample(self.values, len(self.values))
        weights = self._pick_kinds(rng)
        known: list[tuple] = []
        fresh = rng.uniform(*self.mixture.fresh)
        while len(doc.tokens) < length:
            enough = len(keys) > 4 and len(values) > 4
            if enough and (not known or rng.random() < fresh):
                sentences, question = self.facts(rng, rng.choices(KINDS, weights)[0], keys, values)
                for sentence in sentences:
                    doc.add(sentence)
                known.append(question)
            else:
                self.answer(rng, doc, rng.choice(known), ask=False)

    def _records(self, rng: random.Random, doc: Document, length: int) -> None:
        """Records of a few keys in random order, each value learned from the second time on."""
        count = rng.randint(4, max(5, min(len(self.keys), length // 5)))
        pairs = list(zip(rng.sample(self.keys, count), rng.sample(self.values, count), strict=True))
        seen: set[int] = set()
        kind = KINDS.index("pair")
        while len(doc.tokens) < length:
            key, value = rng.choice(pairs)
            tokens = self.lexicon.fill(templates.RECORD, key, value)
            doc.add(tokens[:1])
            doc.add(tokens[1:2], DECISION_WEIGHT if key in seen else 0.0, kind if key in seen else -1)
            doc.add(tokens[2:])
            seen.add(key)

    def _questions(self, rng: random.Random, doc: Document, length: int) -> None:
        """Facts and filler in random order with questions at the end or in between."""
        lex, mix = self.lexicon, self.mixture
        keys, values = rng.sample(self.keys, len(self.keys)), rng.sample(self.values, len(self.values))
        weights = self._pick_kinds(rng)
        filler_share = rng.choice((0.0, 0.5, 1.0))
        subset = rng.sample(lex.nouns, rng.choice((24, 96, 400)))
        asked: list[tuple] = []
        groups: list[list[list[int]]] = []
        room, ask_room = length - 1, int(length * mix.question_share)
        wanted = rng.randint(2, mix.max_questions)
        used = 0
        while len(asked) < wanted:
            sentences, question = self.facts(rng, rng.choices(KINDS, weights)[0], keys, values)
            cost = Document()
            self.answer(rng, cost, question)
            size = sum(map(len, sentences)) + len(cost.tokens)
            if asked and used + size > ask_room + sum(map(len, sentences)) or used + size > room:
                break
            used += size
            asked.append(question)
            groups.append(sentences)
        while used < room:
            if rng.random() < filler_share or len(keys) < 8 or len(values) < 8:
                sentences = [self.filler(rng, subset)]
            else:
                sentences, _ = self.facts(rng, rng.choices(KINDS, weights)[0], keys, values)
            size = sum(map(len, sentences))
            if used + size > room:
                break
            used += size
            groups.append(sentences)
        interleaved = rng.random() < mix.interleave
        pending = {id(groups[index]): question for index, question in enumerate(asked)}
        order = _weave(rng, groups)
        late: list[tuple] = []
        for sentence, group, last in order:
            doc.add(sentence, 0.0)
            if last and (question := pending.get(id(group))) is not None:
                late.append(question)
            while interleaved and late and rng.random() < 0.15:
                self.answer(rng, doc, late.pop(rng.randrange(len(late))))
        rng.shuffle(late)
        for question in late:
            self.answer(rng, doc, question)
        doc.add([lex.newline] * max(0, length - len(doc.tokens)))


def _weave(rng: random.Random, groups: list[list[list[int]]]) -> list[tuple[list[int], list, bool]]:
    """All sentences in random order, each group's own sentences in their order."""
    slots = [group for group in groups for _ in group]
    rng.shuffle(slots)
    seen: dict[int, int] = {}
    out = []
    for group in slots:
        index = seen.get(id(group), 0)
        seen[id(group)] = index + 1
        out.append((group[index], group, index == len(group) - 1))
    return out


@dataclass(frozen=True)
class Batch:
    """Arrays of one step: tokens and positions ``[R, n]`` int32, and the learned targets.

    `rows` ``[R, S]`` int32 are the places whose next token is scored, `targets` ``[R, S]`` int32 those next tokens,
    `weights` ``[R, S]`` float32 their weights, `kinds` ``[R, S]`` int8 the task of a retrieval decision (or -1).
    """

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray


def make_batch(
    maker: DocumentMaker,
    seed: tuple[int, ...],
    rows: int,
    length: int,
    *,
    max_position: int,
    gap_share: float = 0.0,
    language_weight: float = 0.02,
    scored_share: float = 0.375,
) -> Batch:
    """A batch from a seed: the same seed gives the same batch on every machine."""
    rng = random.Random(repr(seed))
    scored = int(length * scored_share)
    columns: list[tuple] = []
    for _ in range(rows):
        tokens, weights, kinds = maker.make(rng, length)
        learned = [index for index in range(length - 1) if weights[index + 1] > 0.0][:scored]
        rest = [index for index in range(length - 1) if weights[index + 1] == 0.0]
        extra = rng.sample(rest, max(0, scored - len(learned)))
        places = learned + extra
        columns.append(
            (
                tokens,
                _positions(rng, length, max_position, gap_share),
                places,
                [tokens[index + 1] for index in places],
                [weights[index + 1] or language_weight for index in places],
                [kinds[index + 1] for index in places],
            )
        )
    dtypes = (np.int32, np.int32, np.int32, np.int32, np.float32, np.int8)
    return Batch(*(np.asarray(column, dtype) for column, dtype in zip(zip(*columns, strict=True), dtypes, strict=True)))


def _positions(rng: random.Random, length: int, max_position: int, gap_share: float) -> list[int]:
    """Positions with up to four random gaps, so that short documents train long distances."""
    if max_position <= length or rng.random() >= gap_share:
        return list(range(length))
    cuts = sorted(rng.sample(range(1, length), rng.randint(1, 4)))
    total = rng.randint(0, max_position - length)
    stops = sorted(rng.randint(0, total) for _ in cuts)
    out, offset, following = [], 0, dict(zip(cuts, stops, strict=True))
    for index in range(length):
        offset = following.get(index, offset)
        out.append(index + offset)
    return out
