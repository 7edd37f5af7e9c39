"""Cells: documents of an exact length under any tokenizer, the same every time, with room for every reply."""

from __future__ import annotations

import pytest

from sparsejax.errors import ConfigError
from sparsejax.evaluation.suite import CASES, CORE, DEFAULT, QUICK, Suite, make_cell
from tests.evaluation.tokenizers import tokenizer


@pytest.mark.parametrize("case", sorted(CASES))
def test_cells_are_exact_and_replies_fit(case: str) -> None:
    known = tokenizer("compact")
    cell = make_cell(case, 480, 2, 5, known)
    assert [len(ids) for ids in cell.prompts] == [480, 480]
    assert cell == make_cell(case, 480, 2, 5, known)
    for turn in cell.turns:
        assert len(known(turn.reply).input_ids) < cell.max_tokens


def test_samples_are_counted_on_from_the_seed() -> None:
    known = tokenizer("compact")
    assert make_cell("kv", 128, 3, 4, known).prompts[1:] == make_cell("kv", 128, 2, 5, known).prompts


def test_a_bytes_tokenizer_works_too() -> None:
    cell = make_cell("niah_multikey", 900, 1, 0, tokenizer("bytes"))
    assert len(cell.prompts[0]) == 900 and cell.max_tokens > 12


def test_suites_are_checked() -> None:
    assert set(CORE) < set(DEFAULT.cases) <= set(CASES) and set(QUICK.cases) < set(CASES)
    assert DEFAULT.within(1024).lengths == (512, 1024)
    assert DEFAULT.within(300).lengths == (300,)
    with pytest.raises(ConfigError, match="known are"):
        Suite(cases=("nothing",))
    with pytest.raises(ConfigError, match="at least one"):
        Suite(samples=0)
