"""Which policies an evaluation compares."""

from __future__ import annotations

import pytest

from sparsejax.errors import ConfigError
from sparsejax.evaluation import policies
from sparsejax.evaluation.policies import DENSE, Policy, by_codec, make_policies, parse_budget, takes_budget
from sparsejax.sparsity.policy import SparsityConfig


def test_dense_comes_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "PRESETS", ("quest", "dense"))
    both = (DENSE, Policy("quest", 0.5), Policy("quest", 64))
    assert make_policies(("quest", "dense", "quest"), (0.5, 64, 64)) == both
    assert make_policies(("quest",)) == (DENSE, Policy("quest"))


def test_a_policy_is_what_the_engine_takes() -> None:
    assert DENSE.sparsity == DENSE.label == "dense"
    assert Policy("quest", 0.25).sparsity == {"preset": "quest", "budget": 0.25}
    assert Policy("quest", 2048).label == "quest 2048"


def test_what_reads_and_keeps_everything_takes_no_budget() -> None:
    assert not takes_budget("dense")
    assert takes_budget("quest") and takes_budget("window")


def test_policies_of_a_codec_share_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coded:
        codec = "int8"

        @classmethod
        def coerce(cls, value: object) -> object:
            return cls if value in ("dense8", {"preset": "quest8", "budget": 64}) else SparsityConfig.coerce(value)

    monkeypatch.setattr(policies, "SparsityConfig", Coded)
    quest, dense8, quest8 = Policy("quest"), Policy("dense8"), Policy("quest8", 64)
    assert by_codec((DENSE, dense8, quest, quest8)) == {"dense": (DENSE, quest), "int8": (dense8, quest8)}


def test_budgets_are_tokens_or_shares() -> None:
    assert [parse_budget(text) for text in ("2048", "0.25", "25%")] == [2048, 0.25, 0.25]
    assert isinstance(parse_budget("2048"), int)
    with pytest.raises(ConfigError, match="share of the prompt"):
        parse_budget("half")


@pytest.mark.parametrize(("presets", "budgets"), [(("dens",), ()), (("dense",), (0,)), (("dense",), (1.5,))])
def test_bad_choices_are_refused(presets: tuple, budgets: tuple) -> None:
    with pytest.raises(ConfigError, match="known are|above 0"):
        make_policies(presets, budgets)


def test_policies_that_one_engine_can_serve_go_together() -> None:
    given = make_policies(("quest", "int8", "window", "int4"))
    groups = by_codec(given)
    assert {codec: [policy.preset for policy in group] for codec, group in groups.items()} == {
        "dense": ["dense", "quest", "window"],
        "int8": ["int8"],
        "int4": ["int4"],
    }
    assert make_policies(("int8",), (0.25, 0.5)) == (DENSE, Policy("int8"))
