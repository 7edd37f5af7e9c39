"""A process without room for another compiled program says so before it crashes."""

from __future__ import annotations

import pytest

from sparsejax.engine import mappings
from sparsejax.errors import CapacityError
from tests.engine.models import tiny_engine


def files(monkeypatch, tmp_path, held: int, limit: int) -> None:
    for name, text in (("HELD", "a mapping\n" * held), ("LIMIT", f"{limit}\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(mappings, name, tmp_path / name)


def test_a_program_is_refused_where_it_would_crash_the_process(monkeypatch, tmp_path):
    with tiny_engine() as engine:
        files(monkeypatch, tmp_path, 96, 100)
        with pytest.raises(CapacityError, match=r"holds 96 .* allows 100.*vm.max_map_count=400"):
            engine.generate([[1, 2, 3]])
        files(monkeypatch, tmp_path, 95, 100)
        assert engine.generate([[1, 2, 3]])[0].finished


def test_a_system_that_does_not_count_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(mappings, "LIMIT", tmp_path / "none")
    assert mappings.mappings() is None
    mappings.check_mappings()
