"""Policies by name: a preset, or presets joined as in ``keydiff:0.5+quest:0.25+int8``. Imports no JAX.

A joined name has at most one preset that says what stays, one that says what a step reads and one that says how pages
are stored. What follows a colon is that preset's budget: tokens, or a share of the prompt (0.25 or 25%).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsejax.errors import ConfigError
from sparsejax.sparsity.eviction import Keep
from sparsejax.sparsity.valid import PLAIN_CODECS

if TYPE_CHECKING:
    from sparsejax.sparsity.policy import SparsityConfig

AXES = {"keep": "what stays", "select": "what a step reads", "codec": "how pages are stored"}
OF_BOTH = ("sink", "recent")
"""Parameters that mean the same for a keep and a select, and go to both."""


class Part(NamedTuple):
    """One preset of a joined name: what it changes of a policy that does nothing, and its budget if one is written."""

    name: str
    changes: dict[str, Any]
    budget: int | float | None

    @property
    def stores_only(self) -> bool:
        """Whether it says how pages are stored and nothing else."""
        return self.changes.keys() == {"codec"}

    @property
    def yields_codec(self) -> bool:
        """Whether its codec gives way to one that is named beside it (`turbo`); ``deltakv`` is more than a codec."""
        return not self.stores_only and self.changes.get("codec") in PLAIN_CODECS


def parts(name: str, presets: Mapping[str, SparsityConfig]) -> tuple[Part, ...]:
    """The presets of a joined name.

    Raises:
        ConfigError: one is unknown or takes no budget, or two say the same.
    """
    found = tuple(_part(text, presets) for text in str(name).split("+"))
    for axis, meaning in AXES.items():
        said = [part for part in found if axis in part.changes]
        if axis == "codec" and any(part.stores_only for part in said):
            said = [part for part in said if not part.yields_codec]
        if len(said) > 1:
            allowed = ", ".join(one for one in presets if axis in _part(one, presets).changes)
            both = " and ".join(part.name for part in said)
            raise ConfigError(f"sparsity={name!r}: {both} both say {meaning}; join at most one of {allowed}.")
    return found


def fields_of(name: str, presets: Mapping[str, SparsityConfig], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the `SparsityConfig` that a name and parameters describe.

    Parameters are those of the keep, where one is named, and of the select, where one is named or no keep is. `sink`
    and `recent` go to both, `budget` to the one that the name gives none, and `codec` belongs to every name.

    Raises:
        ConfigError: the name is wrong (see `parts`), or a parameter belongs to neither or could be of both.
    """
    found = parts(name, presets)
    made: dict[str, Any] = {}
    for part in sorted(found, key=lambda part: part.stores_only):  # a codec that is named comes last and wins
        made |= part.changes
    keep, select = (next((part for part in found if axis in part.changes), None) for axis in ("keep", "select"))
    config = {field.name for field in dataclasses.fields(next(iter(presets.values())))}
    to_keep = {field.name for field in dataclasses.fields(Keep)} if keep else set()
    to_rest = config if select or not keep else {"codec"}
    of_keep: dict[str, Any] = {}
    for part, taken, given in ((keep, to_keep, of_keep), (select, to_rest, made)):
        if part is not None and part.budget is not None:
            taken.discard("budget")
            given["budget"] = part.budget
    for key, value in parameters.items():
        if key not in to_keep | to_rest:
            raise ConfigError(f"{key!r} is no parameter of {name!r}; there are {', '.join(sorted(to_keep | to_rest))}.")
        if key in to_keep & to_rest and key not in OF_BOTH:
            each = f"{keep.name}:0.5+{select.name}:0.25" if key == "budget" else "SparsityConfig(keep=Keep(...), ...)"
            raise ConfigError(f"{key!r} could be that of {keep.name} or of {select.name}: write {each}.")
        if key in to_keep:
            of_keep[key] = value
        if key in to_rest:
            made[key] = value
    return made | ({"keep": dataclasses.replace(made["keep"], **of_keep)} if of_keep else {})


def parse_budget(text: str) -> int | float:
    """``"2048"`` is tokens, ``"0.25"`` or ``"25%"`` a share of the prompt."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise ConfigError(f"budget {text!r}: write tokens (2048) or a share of the prompt (0.25 or 25%).") from error


def _part(text: str, presets: Mapping[str, SparsityConfig]) -> Part:
    name, colon, budget = text.partition(":")
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"sparsity={name!r} is not a preset{hint}; there are {', '.join(presets)}, and some joined by + "
            "(keydiff+quest+int8)."
        )
    preset, plain = presets[name], type(presets[name])()
    names = [field.name for field in dataclasses.fields(preset)]
    changes = {key: getattr(preset, key) for key in names if getattr(preset, key) != getattr(plain, key)}
    if colon and not {"keep", "select"} & changes.keys():
        raise ConfigError(f"sparsity={text!r}: {name} takes no budget; leave {colon + budget!r} out.")
    return Part(name, changes, parse_budget(budget) if colon else None)
