"""Which policies an evaluation compares."""

from __future__ import annotations

import pytest

from sparsejax.errors import ConfigError
from sparsejax.evaluation.policies import DENSE, Policy, by_store, make_policies, takes_budget
from sparsejax.sparsity.names import parse_budget
from sparsejax.sparsity.policy import SparsityConfig, declared


def test_dense_comes_first_and_once() -> None:
    both = (DENSE, Policy("quest", 0.5), Policy("quest", 64))
    assert make_policies(("quest", "dense", "quest"), (0.5, 64, 64)) == both
    assert make_policies(("quest",)) == (DENSE, Policy("quest"))


def test_a_policy_is_what_the_engine_takes() -> None:
    assert DENSE.sparsity == DENSE.label == "dense"
    assert Policy("quest", 0.25).sparsity == {"preset": "quest", "budget": 0.25}
    assert Policy("quest", 2048).label == "quest 2048"


def test_what_reads_and_keeps_everything_takes_no_budget() -> None:
    assert not takes_budget(DENSE) and not takes_budget(Policy("int8"))
    assert all(takes_budget(Policy(name)) for name in ("quest", "window", "snapkv", "streaming"))


def test_a_preset_may_be_changed() -> None:
    given = {"preset": "turbo", "filter_layers": [2, 3], "top_p": 0.9, "codec": "int4"}
    _, half, quarter, fixed = make_policies((given, given | {"budget": 64}), (0.5, 0.25))
    assert half.sparsity == given | {"budget": 0.5, "filter_layers": (2, 3)} and half.store == "int4"
    assert half.label == "turbo filter_layers=2+3 top_p=0.9 codec=int4 0.5"
    assert half.method == quarter.method == fixed.method and fixed.budget == 64
    with pytest.raises(ConfigError, match="no parameter of 'turbo'"):
        make_policies(({"preset": "turbo", "top": 1},))


def test_policies_of_a_store_share_an_engine() -> None:
    quest, coded, window = Policy("quest"), Policy("int8"), Policy("window", 64)
    assert by_store((DENSE, quest, coded, window)) == {"dense": (DENSE, quest, window), "int8": (coded,)}
    ours, theirs = (Policy("deltakv", changed=(("compressor", folder),)) for folder in ("ours", "theirs"))
    follows = Policy("omnikv", changed=(("codec", "deltakv"), ("compressor", "ours")))
    assert by_store((ours, theirs, follows)) == {"deltakv ours": (ours, follows), "deltakv theirs": (theirs,)}
    for group in by_store(make_policies(budgets=(0.25,))).values():
        declared([policy.sparsity for policy in group])  # an engine takes them together


def test_budgets_are_tokens_or_shares() -> None:
    assert [parse_budget(text) for text in ("2048", "0.25", "25%")] == [2048, 0.25, 0.25]
    assert isinstance(parse_budget("2048"), int)
    with pytest.raises(ConfigError, match="share of the prompt"):
        parse_budget("half")


@pytest.mark.parametrize(("presets", "budgets"), [(("dens",), ()), (("dense",), (0,)), (("dense",), (1.5,))])
def test_bad_choices_are_refused(presets: tuple, budgets: tuple) -> None:
    with pytest.raises(ConfigError, match="there are|above 0"):
        make_policies(presets, budgets)


def test_policies_that_one_engine_can_serve_go_together() -> None:
    given = make_policies(("quest", "int8", "window", "int4"))
    groups = by_store(given)
    assert {codec: [policy.preset for policy in group] for codec, group in groups.items()} == {
        "dense": ["dense", "quest", "window"],
        "int8": ["int8"],
        "int4": ["int4"],
    }
    assert make_policies(("int8",), (0.25, 0.5)) == (DENSE, Policy("int8"))


def test_a_joined_policy_takes_a_budget_for_each_part_that_has_none() -> None:
    given = ("snapkv+int4", "keydiff+quest+int8", "keydiff:0.5+quest", "keydiff:0.5+quest:64", "quest:64+fp8", "int4")
    labels = [policy.label for policy in make_policies(given, (0.25, 100))]
    assert labels == [
        "dense", "snapkv+int4 0.25", "snapkv+int4 100", "keydiff:0.25+quest:0.125+int8", "keydiff:100+quest:50+int8",
        "keydiff:0.5+quest 0.25", "keydiff:0.5+quest 100", "keydiff:0.5+quest:64", "quest:64+fp8", "int4",
    ]  # fmt: skip
    two, three = (SparsityConfig.coerce(Policy(*one).sparsity) for one in ((given[2], 0.25), (labels[3],)))
    assert (two.keep.budget, two.budget) == (0.5, 0.25) and (three.keep.budget, three.budget) == (0.25, 0.125)
    methods = {policy.method for policy in make_policies(given[1:2], (0.25, 100))}
    assert methods == {"dense", "keydiff+quest+int8"}, "one line of a plot"
    assert list(by_store(make_policies(given, (0.25,)))) == ["dense", "int4", "int8", "fp8"]
