"""Cells: documents of an exact length under any tokenizer, the same every time, with room for every reply."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sparsejax.errors import ConfigError
from sparsejax.evaluation.suite import CASES, CORE, DEFAULT, QUICK, Suite, _request, make_cell
from sparsejax.evaluation.tasks import PROTOCOLS, Ask, Turn
from tests.evaluation.tokenizers import tokenizer


@pytest.mark.parametrize("case", sorted(CASES))
def test_cells_are_exact_and_replies_fit(case: str) -> None:
    known = tokenizer("compact")
    cell = make_cell(case, 480, 2, 5, known)
    assert [len(turns[0].token_ids) for turns in cell.documents] == [480, 480]
    assert cell == make_cell(case, 480, 2, 5, known)
    for request in cell.requests:
        assert len(known(request.turn.reply).input_ids) < cell.max_tokens


@pytest.mark.parametrize("kind", ["compact", "bytes"])
@pytest.mark.parametrize("case", ["kv_dense", "kv_dense_later", "kv_dense_turns"])
def test_what_is_compressed_ends_where_the_protocol_says(case: str, kind: str) -> None:
    known, protocol = tokenizer(kind), CASES[case].protocol
    ((*turns,),) = make_cell(case, 900, 1, 3, known).documents
    assert len(turns) == (4 if protocol == "MT" else 1)
    document = known.decode(turns[0].token_ids[: turns[0].compress_at])
    for index, request in enumerate(turns):
        text = known.decode(request.token_ids)
        assert request.prompt == {"prompt_token_ids": list(request.token_ids), "compress_at": request.compress_at}
        assert text.endswith(request.turn.prompt) and text.startswith(document)
        assert request.compress_at == turns[0].compress_at
        assert ("Q:" in document) == (protocol == "Q+")
        for earlier in turns[:index]:
            assert earlier.turn.prompt + earlier.turn.reply.rstrip() in text
    assert len({request.turn.prompt for request in turns}) == len(turns)


def test_questions_asked_later_have_the_tokens_of_questions_asked_at_once() -> None:
    """So dense attention answers both alike, and what differs is what compression does."""
    later, once = (make_cell(case, 256, 2, 0, tokenizer("compact")) for case in ("kv_dense_later", "kv_dense"))
    assert [one.token_ids for one in later.requests] == [one.token_ids for one in once.requests]
    assert all(one.compress_at < two.compress_at for one, two in zip(later.requests, once.requests, strict=True))


def test_a_token_over_the_end_of_the_document_belongs_to_the_question() -> None:
    class Merging:
        """Letters, but a full stop before a line break is one token."""

        def __call__(self, text: str, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[ord(letter) for letter in text.replace(".\n", "|")])

    request = _request(Ask("It is.\nQ", "It is.", Turn("\nQ", ("a",), frozenset("a"), False, " a")), Merging())
    assert request.compress_at == len("It is") and len(request.token_ids) == len("It is|Q")


def test_samples_are_counted_on_from_the_seed() -> None:
    known = tokenizer("compact")
    assert make_cell("kv", 128, 3, 4, known).documents[1:] == make_cell("kv", 128, 2, 5, known).documents


def test_a_bytes_tokenizer_works_too() -> None:
    cell = make_cell("niah_multikey", 900, 1, 0, tokenizer("bytes"))
    assert len(cell.requests[0].token_ids) == 900 and cell.max_tokens > 12


def test_suites_are_checked() -> None:
    assert set(CORE) | set(DEFAULT.cases) < set(CASES) and set(QUICK.cases) < set(DEFAULT.cases)
    assert {CASES[case].protocol for case in DEFAULT.cases} == set(PROTOCOLS)
    assert Suite(lengths=(512, 1024, 2048)).within(1024).lengths == (512, 1024)
    assert DEFAULT.within(300).lengths == (300,)
    with pytest.raises(ConfigError, match="known are"):
        Suite(cases=("nothing",))
    with pytest.raises(ConfigError, match="at least one"):
        Suite(samples=0)
