"""Policies by name: what may be joined, whose a parameter is, and messages that name what is allowed."""

from __future__ import annotations

import itertools

import pytest

from sparsejax.errors import ConfigError
from sparsejax.sparsity.eviction import Keep
from sparsejax.sparsity.policy import PRESETS, SparsityConfig, declared

KEEPS = [name for name, preset in PRESETS.items() if preset.keep.method != "all"]
SELECTS = [name for name, preset in PRESETS.items() if preset.select != "all" and preset.codec is None]
CODECS = [name for name, preset in PRESETS.items() if preset.codec and preset.select == "all"]


def config(name: str, **parameters) -> SparsityConfig:
    return SparsityConfig.preset(name, **parameters)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_the_table_says(name: str) -> None:
    assert config(name) == PRESETS[name]


def test_any_keep_select_and_codec_are_joined_in_any_order() -> None:
    for keep, select, codec in itertools.product(KEEPS, SELECTS, CODECS):
        joined = ["+".join(order) for order in itertools.permutations((f"{keep}:0.5", f"{select}:64", codec))]
        filters = PRESETS[select].filter_layers
        if (keep, select) == ("pyramidkv", "omnikv"):
            with pytest.raises(ConfigError, match="lists of pages pass from layer to layer"):
                config(joined[0])
            continue
        its = config(keep, budget=0.5).keep
        wanted = SparsityConfig(keep=its, select=select, budget=64, codec=codec, filter_layers=filters)
        assert all(config(name) == wanted for name in joined)


def test_what_is_named_wins_over_the_codec_that_turbo_brings() -> None:
    assert config("turbo").codec == config("keydiff+turbo").codec == "int4"
    assert config("turbo+int8").codec == config("int8+turbo").codec == "int8"
    assert config("turbo+dense").codec == "dense" and config("turbo", codec="fp8").codec == "fp8"
    assert {policy.codec for policy in declared(("keydiff+turbo", "fp8"))} == {"fp8"}
    with pytest.raises(ConfigError, match="fp8 and int8, but an engine stores all pages in one"):
        declared(("turbo+int8", "fp8"))


def test_parameters_go_to_whom_they_belong() -> None:
    both = config("keydiff:0.5+quest+int8", budget=64, sink=8, recent=16, pool=3, top_p=0.9)
    assert both == SparsityConfig(
        keep=Keep("keydiff", budget=0.5, sink=8, recent=16, pool=3), select="quest", budget=64, sink=8, recent=16,
        top_p=0.9, codec="int8",
    )  # fmt: skip
    assert config("snapkv+int4", budget=64, interval=256) == SparsityConfig(
        keep=Keep("snapkv", budget=64, interval=256), codec="int4"
    )
    assert config("keydiff+quest:64", budget=0.5).keep.budget == 0.5
    assert config("snapkv", codec="int4") == config("snapkv+int4") == SparsityConfig.coerce({"preset": "snapkv+int4"})


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("snapkv+keydiff", {}, "snapkv and keydiff both say what stays; join at most one of streaming, snapkv, pyr"),
        ("quest+snapkv+turbo", {}, "quest and turbo both say what a step reads; join at most one of window, strided"),
        ("int4+fp8", {}, "int4 and fp8 both say how pages are stored; join at most one of dense, turbo, int8"),
        ("deltakv+int4", {}, "deltakv and int4 both say how pages are stored"),
        ("snapkv+int3", {}, r"'int3' is not a preset \(did you mean 'int8'\?\); there are dense, .* joined by \+"),
        ("snapkv++int4", {}, "sparsity='' is not a preset; there are dense"),
        ("snapkv:0.5+int4:0.5", {}, "int4 takes no budget; leave ':0.5' out"),
        ("snapkv:half", {}, "budget 'half': write tokens"),
        ("snapkv:1.5", {}, "a share lies in"),
        ("keydiff+quest", {"budget": 64}, "could be that of keydiff or of quest: write keydiff:0.5[+]quest:0.25"),
        ("keydiff+quest", {"interval": 64}, "could be that of keydiff or of quest: write SparsityConfig"),
        ("keydiff:64+quest:64", {"budget": 64}, "'budget' is no parameter of 'keydiff:64[+]quest:64'; there are beta"),
        ("snapkv+int4", {"top_p": 0.5}, "'top_p' is no parameter of 'snapkv[+]int4'; there are beta, budget, codec"),
        ("deltakv+streaming", {}, "keep='streaming' does not go with codec='deltakv'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_what_does(name: str, parameters: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(name, **parameters)
