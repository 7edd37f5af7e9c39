"""Which policies an evaluation compares."""

from __future__ import annotations

import pytest

from sparsejax.errors import ConfigError
from sparsejax.evaluation import policies
from sparsejax.evaluation.policies import DENSE, Policy, make_policies, parse_budget


def test_dense_comes_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "PRESETS", ("quest", "dense"))
    both = (DENSE, Policy("quest", 0.5), Policy("quest", 64))
    assert make_policies(("quest", "dense", "quest"), (0.5, 64, 64)) == both
    assert make_policies(("quest",)) == (DENSE, Policy("quest"))


def test_a_policy_is_what_the_engine_takes() -> None:
    assert DENSE.sparsity == DENSE.label == "dense"
    assert Policy("quest", 0.25).sparsity == {"preset": "quest", "budget": 0.25}
    assert Policy("quest", 2048).label == "quest 2048"


def test_budgets_are_tokens_or_shares() -> None:
    assert [parse_budget(text) for text in ("2048", "0.25", "25%")] == [2048, 0.25, 0.25]
    assert isinstance(parse_budget("2048"), int)
    with pytest.raises(ConfigError, match="share of the prompt"):
        parse_budget("half")


@pytest.mark.parametrize(("presets", "budgets"), [(("dens",), ()), (("dense",), (0,)), (("dense",), (1.5,))])
def test_bad_choices_are_refused(presets: tuple, budgets: tuple) -> None:
    with pytest.raises(ConfigError, match="known are|above 0"):
        make_policies(presets, budgets)
