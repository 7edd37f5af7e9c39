"""What the field knows to fail fails in the stored evaluations too, and what the pages claim holds in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/embedded"


@pytest.fixture(scope="module")
def shares() -> dict[str, dict[tuple[str, str], float]]:
    """Share of right documents by file, policy and case."""
    return {name: answers(json.loads((RESULTS / f"{name}.json").read_text())) for name in ("default", "keeps")}


def answers(stored: dict[str, Any]) -> dict[tuple[str, str], float]:
    """By policy and case, at the shortest length."""
    cells = [(policy["policy"], cell) for policy in stored["policies"] for cell in policy["cells"]]
    return {(name, cell["case"]): cell["accuracy"] for name, cell in sorted(cells, key=lambda one: -one[1]["length"])}


def test_a_window_loses_the_needle(shares) -> None:
    found = shares["default"]
    for policy in ("streaming 0.25", "window 0.25", "random 0.25", "random_keep 0.25"):
        assert found[policy, "niah_single"] <= 0.5 < found["dense", "niah_single"] == 1, policy
    assert found["oracle 0.25", "niah_single"] == 1


def test_snapkv_loses_the_question_that_comes_later(shares) -> None:
    for found, budgets in ((shares["default"], ("0.25", "0.5")), (shares["keeps"], ("0.1", "0.25", "0.5"))):
        for budget in budgets:
            seen, later = (found[f"snapkv {budget}", f"niah_multikey_dense{when}"] for when in ("", "_later"))
            assert seen == 1 and later <= 0.75, budget


def test_evictions_fall_off_a_cliff_at_nine_tenths(shares) -> None:
    found = shares["keeps"]
    for policy in ("keydiff", "rkv"):
        quarter, tenth = (found[f"{policy} {budget}", "kv_dense_later"] for budget in ("0.25", "0.1"))
        assert quarter == 1 and tenth < 0.75, policy
    worst = {policy: right for (policy, case), right in found.items() if case == "kv_dense_turns"}
    assert all(right < 0.1 for policy, right in worst.items() if policy.endswith(" 0.1")) and worst["dense"] == 1


def test_cuts_while_an_answer_is_made_cost_rkv_little() -> None:
    found = answers(json.loads((RESULTS / "long_output.json").read_text()))
    dense = {case: right for (policy, case), right in found.items() if policy == "dense"}
    for case in ("vt_16_hops", "vt_32_hops"):
        assert dense[case] - found["rkv window=8 interval=8 0.25", case] <= 1 / 16
        assert all(found[f"{policy} 0.5", case] == 0 for policy in ("snapkv", "h2o interval=8", "streaming interval=8"))


def test_turbo_loses_no_point_at_a_quarter_of_the_bytes() -> None:
    policies = json.loads((RESULTS / "default.json").read_text())["policies"]
    dense, turbo = (next(one for one in policies if one["policy"] == name) for name in ("dense", "turbo 0.25"))
    assert min(cell["difference"] for cell in turbo["cells"]) >= -0.01
    read, whole = (one["kv"][-1]["read_bytes"] + one["kv"][-1]["bounds_bytes"] for one in (turbo, dense))
    assert read <= whole / 4
