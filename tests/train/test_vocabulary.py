"""The compact vocabulary: every text comes back, every listed word is one token, transformers reads the files."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.evaluation.tasks import words
from tests.evaluation.tokenizers import tokenizer
from train.vocabulary import build_tokenizer, token_strings

BUILT = build_tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_every_text_comes_back(text: str) -> None:
    assert BUILT.decode(BUILT.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_listed_words_are_one_token() -> None:
    for listed in (words.NOUNS, words.VALUES, words.ADJECTIVES, words.FUNCTION_WORDS):
        assert all(len(BUILT.encode(f" {word}", add_special_tokens=False).ids) == 1 for word in listed)
    assert len(set(token_strings())) == len(token_strings())


def test_a_chat_becomes_a_question() -> None:
    talk = [{"role": "user", "content": " box: 204;\nWhat is the value of box?"}]
    text = tokenizer("compact").apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "<bos> box: 204;\nQ: What is the value of box?\nA:"
