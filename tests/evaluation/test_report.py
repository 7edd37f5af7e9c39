"""What is derived from measurements: learned cells, the worst, the cliff, text, JSON and the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sparsejax.errors import ConfigError
from sparsejax.evaluation import plot
from sparsejax.evaluation.policies import DENSE, Policy
from sparsejax.evaluation.report import as_json, as_text
from sparsejax.evaluation.results import CellResult, Evaluation, KvBytes, PolicyResult
from sparsejax.evaluation.suite import Suite
from sparsejax.evaluation.summary import cliffs, summarize


def cell(case: str, right: int, count: int = 20) -> CellResult:
    outcomes = tuple(index < right for index in range(count))
    replies = tuple("yes" if one else "no" for one in outcomes)
    return CellResult(case, 512, outcomes, right / count, 10_000, 2.0, replies, ("yes",) * count)


def result(policy: Policy, held: int, **right: int) -> PolicyResult:
    cells = tuple(cell(case, count) for case, count in right.items())
    return PolicyResult(policy, cells, (KvBytes(512, held, 512_000, held / 2, 0.004),))


@pytest.fixture
def found() -> Evaluation:
    results = (
        result(DENSE, 512_000, kv=20, niah_single=19, qa=3),
        result(Policy("quest", 0.5), 256_000, kv=20, niah_single=19),
        result(Policy("quest", 0.25), 128_000, kv=15, niah_single=19),
        result(Policy("other"), 64_000, kv=1, niah_single=1),
    )
    suite = Suite(cases=("kv", "niah_single", "qa"), lengths=(512,), samples=20)
    return Evaluation("model", suite, results, (("fwe", 512, "too short"),), 5.0)


def test_only_learned_cells_count(found: Evaluation) -> None:
    summary = summarize(found, found.results[2])
    assert summary.accuracy == pytest.approx((15 + 19) / 40)
    assert (summary.worst.case, summary.worst_difference) == ("kv", pytest.approx(-0.25))
    assert summary.compression == summary.saving == 4.0
    assert summarize(found, found.dense).worst.case == "niah_single"


def test_the_cliff_is_the_least_read_without_loss(found: Evaluation) -> None:
    edges = cliffs(found)
    assert edges["dense"].saving == 1.0
    assert edges["quest"].result.policy == Policy("quest", 0.5) and edges["quest"].saving == 2.0
    assert edges["other"] is None


def test_text_says_what_was_not_learned(found: Evaluation) -> None:
    text = as_text(found)
    assert "Not learned" in text and "qa at 512: 15.0" in text
    assert "quest: 2.00 times fewer bytes read (quest 0.5)" in text and "other: none of the budgets" in text
    assert "kv at 512: -25.0" in text and "fwe at 512 was left out: too short" in text
    assert "512,000 bytes held (1,000 per token)" in text


def test_json_is_complete_and_plain(found: Evaluation) -> None:
    stored = json.loads(json.dumps(as_json(found)))
    assert stored["not_learned"] == [["qa", 512]]
    dense, half, quarter, other = stored["policies"]
    assert quarter["cells"][0]["difference"] == -0.25 and dense["cells"][0]["difference"] is None
    assert dense["cells"][1]["outcomes"] == "1" * 19 + "0"
    assert dense["cells"][1]["wrong"] == [{"expected": "yes", "reply": "no"}]
    (kv,) = half["kv"]
    assert kv.pop("timing") == {"step_seconds": 0.004}
    wanted = {"length": 512, "held_bytes": 256_000, "peak_bytes": 512_000, "read_bytes": 128_000, "bounds_bytes": 0}
    assert kv == wanted
    assert other["worst"] == ["kv", 512, 0.05] and stored["cliffs"]["other"] is None


def test_a_picture_is_drawn_where_matplotlib_is_there(found: Evaluation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.draw(found, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"sparsejax\[plot\]"):
        plot.load_pyplot()
