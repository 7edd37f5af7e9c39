"""Flags made from dataclasses: every field, its type, its help, and only what was given."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import pytest

from sparsejax.cli import options
from sparsejax.config import EngineConfig
from sparsejax.engine.request import SamplingParams


@dataclasses.dataclass
class Sample:
    """A class of every kind of field.

    Attributes:
        count: how many,
            over two lines.
        room_bytes: a size.
        limit, other_limit: optional numbers.
        share: a number at 100%.
        mode: one of two.
        names: several texts.
        ids: several numbers.
        bias: a mapping.
        policy: a name or an object.
        flag: on or off.
    """

    count: int = 3
    room_bytes: int | None = None
    limit: int | None = 16
    other_limit: int | None = None
    share: float = 0.5
    mode: Literal["a", "b"] = "a"
    names: str | Sequence[str] | None = None
    ids: Sequence[int] | None = None
    bias: Mapping[int, float] | None = None
    policy: str | Mapping | None = None
    flag: bool = True
    hidden: int = 0


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    options.add_fields(made, "sample", Sample)
    return made


def test_only_given_flags_count(parser):
    assert options.given(parser.parse_args([]), Sample) == {}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--count", "7"], {"count": 7}),
        (["--room-bytes", "1.5GiB"], {"room_bytes": 3 * 2**29}),
        (["--room-bytes", "2k"], {"room_bytes": 2000}),
        (["--limit", "none", "--other-limit", "4"], {"limit": None, "other_limit": 4}),
        (["--share", "0.25"], {"share": 0.25}),
        (["--mode", "b"], {"mode": "b"}),
        (["--names", "x", "--names", "y z"], {"names": ["x", "y z"]}),
        (["--ids", "1", "--ids", "2"], {"ids": [1, 2]}),
        (["--bias", '{"4": -1.5}'], {"bias": {"4": -1.5}}),
        (["--policy", "quest"], {"policy": "quest"}),
        (["--policy", '{"preset": "quest"}'], {"policy": {"preset": "quest"}}),
        (["--no-flag"], {"flag": False}),
        (["--hidden", "1"], {"hidden": 1}),
    ],
)
def test_values(parser, argv, expected):
    assert options.given(parser.parse_args(argv), Sample) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--room-bytes", "lots"], "4GiB"),
        (["--bias", "5"], "JSON object"),
        (["--bias", "{"], "not valid JSON"),
        (["--limit", "x"], "invalid int value"),
        (["--mode", "c"], "invalid choice"),
    ],
)
def test_bad_values_name_the_fix(parser, capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_comes_from_the_docstring(parser):
    text = " ".join(parser.format_help().split())
    assert "how many, over two lines (default: 3)" in text
    assert "a number at 100% (default: 0.5)" in text
    assert "--hidden" not in text


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams])
def test_every_documented_field_is_a_flag(cls):
    made = argparse.ArgumentParser()
    options.add_sampling_options(made)
    options.add_engine_options(made)
    flags = {action.dest for action in made._actions}
    assert set(options.documented(cls)) - options.NOT_FLAGS <= flags


def test_seed_goes_to_requests_and_sparsity_to_the_engine():
    made = argparse.ArgumentParser()
    options.add_sampling_options(made)
    options.add_engine_options(made)
    args = made.parse_args(["--seed", "5", "--sparsity", "dense", "--max-tokens", "3"])
    params = options.make_sampling(args, temperature=0.5)
    assert (params.seed, params.sparsity, params.max_tokens, params.temperature) == (5, None, 3, 0.5)
    assert (options.make_config(args).seed, options.make_config(args).sparsity) == (0, "dense")
