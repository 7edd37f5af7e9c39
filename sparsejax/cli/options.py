"""Flags made from the fields of EngineConfig and SamplingParams, so the command line never lags behind."""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import inspect
import json
import re
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


def parse_bytes(text: str) -> int:
    """``"4GiB"``, ``"512MiB"``, ``"2G"`` or a plain number of bytes."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 4GiB, 512MiB, 2GB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2] or ""])


def parse_value(text: str) -> Any:
    """JSON where the text looks like an object or a list, otherwise the text itself."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from error


def parse_mapping(text: str) -> dict[str, Any]:
    value = parse_value(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"42\": -5}}'")
    return value


def optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same parser, but ``none`` is None: the field's "no limit" or "as the model says"."""

    def parse_or_none(text: str) -> Any:
        return None if text.lower() == "none" else parse(text)

    parse_or_none.__name__ = parse.__name__  # argparse shows it for a value that cannot be parsed
    return parse_or_none


def alternatives(hint: Any) -> list[Any]:
    """The members of a union without None; a plain type is its own only member."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [member for member in members if member is not type(None)]


def flag_settings(name: str, hint: Any) -> dict[str, Any]:
    """argparse settings for one field: how its text becomes a value, and what the help shows."""
    kinds = alternatives(hint)
    only = kinds[0] if len(kinds) == 1 else None
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(only) is Literal:
        return {"choices": get_args(only)}
    for kind in kinds:
        if get_origin(kind) in SEQUENCES:
            inner = next((a for a in get_args(kind) if a is not Ellipsis), str)
            return {
                "action": "append",
                "type": inner if inner in (int, float) else str,
                "metavar": name.rsplit("_", 1)[-1].upper(),
            }
    if only is int:
        is_bytes = name.endswith("_bytes")
        number = parse_bytes if is_bytes else int
        metavar = "SIZE" if is_bytes else "N"
        return {"type": number if only is hint else optional(number), "metavar": metavar}
    if only is float or set(kinds) == {int, float}:
        return {"type": float, "metavar": "X"}
    if kinds and all(get_origin(kind) in (dict, Mapping) for kind in kinds):
        return {"type": parse_mapping, "metavar": "JSON"}
    plain: Callable[[str], Any] = str if only is str else parse_value
    return {"type": plain, "metavar": name.rsplit("_", 1)[-1].upper()}


def documented(cls: type) -> dict[str, str]:
    """Field name -> what it is, from field metadata or the ``Attributes:`` part of the docstring."""
    found = {f.name: f.metadata["help"] for f in dataclasses.fields(cls) if "help" in f.metadata}
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[2]
    for match in re.finditer(r"^ {4}(\w[\w, ]*): (.+(?:\n {8,}\S.*)*)", text, re.M):
        for name in match[1].split(", "):
            found.setdefault(name, re.sub(r"\s+", " ", match[2]).replace("``", "").strip())
    return found


def add_fields(parser: argparse.ArgumentParser, title: str, cls: type, *, skip: Collection[str] = ()) -> None:
    """One flag per dataclass field under a titled group; a flag that is not given leaves the field's default.

    A field the class does not document is accepted but not shown.
    """
    group = parser.add_argument_group(title)
    hints, help_texts = get_type_hints(cls), documented(cls)
    for field in dataclasses.fields(cls):
        if field.name in skip or not field.init:
            continue
        text = help_texts.get(field.name, "").rstrip(".")
        if isinstance(field.default, (int, float, str)) and field.default not in (False, ""):
            text = f"{text} (default: {field.default})".strip()
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%") if field.name in help_texts or not help_texts else argparse.SUPPRESS,
            **flag_settings(field.name, hints[field.name]),
        )


def given(args: argparse.Namespace, cls: type, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """The values of the fields of ``cls`` that were given on the command line."""
    names = {field.name for field in dataclasses.fields(cls)} - set(skip)
    return {name: value for name, value in vars(args).items() if name in names}


# Named alike in both classes. `--seed` seeds each request; `--sparsity` is the engine's.
ENGINE_ONLY, SAMPLING_ONLY = {"sparsity"}, {"seed"}
NOT_FLAGS = {"output_kind", "detokenize"}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    from sparsejax.config import EngineConfig

    add_fields(parser, "model and engine", EngineConfig, skip=SAMPLING_ONLY)


def add_sampling_options(parser: argparse.ArgumentParser, *, skip: Collection[str] = ()) -> None:
    from sparsejax.engine.request import SamplingParams

    add_fields(parser, "sampling", SamplingParams, skip={*NOT_FLAGS, *ENGINE_ONLY, *skip})


def make_config(args: argparse.Namespace, **defaults: Any) -> Any:
    """The EngineConfig the flags describe over ``defaults``."""
    from sparsejax.config import EngineConfig

    return EngineConfig(**{**defaults, **given(args, EngineConfig, skip=SAMPLING_ONLY)})


def make_engine(args: argparse.Namespace) -> Any:
    """The engine the flags describe."""
    config = make_config(args)  # a bad flag is reported before JAX is imported
    from sparsejax import Engine

    return Engine(config=config)


def make_sampling(args: argparse.Namespace, **defaults: Any) -> Any:
    """SamplingParams from the flags over ``defaults``."""
    from sparsejax.engine.request import SamplingParams

    return SamplingParams(**{**defaults, **given(args, SamplingParams, skip=ENGINE_ONLY)})
