"""Training documents: what is learned is what the document states."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from train.data import make_batch
from train.documents import DocumentMaker, Mixture
from train.facts import KINDS
from train.lexicon import Lexicon
from train.vocabulary import build_tokenizer

STATED = {
    "needle": re.compile(r" magic number for (\w+) is (\w+)\."),
    "pair": re.compile(r" (\w+): (\w+);"),
}
EVERYTHING = Mixture(codes=1.0, chain=1.0, many=0.5, relation=1.0)


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon()


@pytest.mark.parametrize("kind", sorted(STATED))
@pytest.mark.parametrize("recall", [0.0, 1.0])
def test_answers_are_what_the_document_states(lexicon: Lexicon, kind: str, recall: float) -> None:
    tokenizer = build_tokenizer()
    only = {other: 0.0 for other in KINDS if other != "many"} | {kind: 1.0}
    maker = DocumentMaker(lexicon, Mixture(**only, recall=recall))
    for seed in range(5):
        doc = maker.make(random.Random(seed), 300)
        facts = dict(STATED[kind].findall(tokenizer.decode(doc.tokens)))
        places = [index for index, one in enumerate(doc.kinds) if one == KINDS.index(kind)]
        assert places
        for place in places:
            key, value = (tokenizer.decode([doc.tokens[index]]).strip() for index in (place - 1, place))
            assert doc.targets[place] == doc.tokens[place] and doc.weights[place] > 1.0
            assert facts[key] == value


@pytest.mark.parametrize("length", [64, 257])
def test_batches_repeat_and_have_their_length(lexicon: Lexicon, length: int) -> None:
    maker = DocumentMaker(lexicon, EVERYTHING)
    one, two, other = (
        make_batch(maker, (seed, 0), 3, length, max_position=1024, gap_share=0.5) for seed in (1, 1, 2)
    )
    for name in vars(one):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.tokens, other.tokens)
    assert one.tokens.shape == one.positions.shape == (3, length)
    assert (np.diff(one.positions, axis=1) >= 1).all() and one.positions.max() < 1024
    assert one.rows.max() < length - 1
    asked = one.kinds >= 0
    rows = np.arange(3)[:, None]
    np.testing.assert_array_equal(one.tokens[rows, one.rows + 1][asked], one.targets[asked])


def test_every_kind_is_made(lexicon: Lexicon) -> None:
    maker = DocumentMaker(lexicon, EVERYTHING)
    found = {kind for seed in range(30) for kind in maker.make(random.Random(seed), 400).kinds}
    assert found == {-1, *range(len(KINDS))}
