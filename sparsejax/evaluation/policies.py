"""What gets compared: sparsity presets, each at several budgets, with dense first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.sparsity.kinds import ALL
from sparsejax.sparsity.names import parts
from sparsejax.sparsity.policy import PRESETS, SparsityConfig

BASELINE = "dense"


@dataclass(frozen=True)
class Policy:
    """A preset, or several joined, and a budget: tokens (int), a share of the prompt (float), or what they say (None).

    `changed` are other parameters of the preset, as pairs of name and value.
    """

    preset: str
    budget: int | float | None = None
    changed: tuple[tuple[str, Any], ...] = ()

    @property
    def method(self) -> str:
        """What is the same at all budgets."""
        return self._with_changes(re.sub(r":[^+]+", "", self.preset))

    @property
    def label(self) -> str:
        named = self._with_changes(self.preset)
        return named if self.budget is None else f"{named} {self.budget:g}"

    @property
    def sparsity(self) -> str | dict[str, Any]:
        """What `EngineConfig.sparsity` takes: a name, or a mapping where anything is changed."""
        budget = {} if self.budget is None else {"budget": self.budget}
        return {"preset": self.preset, **budget, **dict(self.changed)} if budget or self.changed else self.preset

    def _with_changes(self, name: str) -> str:
        return " ".join([name, *(f"{name}={_brief(value)}" for name, value in self.changed)])

    @property
    def store(self) -> str:
        """How pages are stored, which is one for all policies of an engine: the codec and, of ``deltakv``, what was
        named of its compressor and filter layers."""
        config = SparsityConfig.coerce(self.sparsity)
        return " ".join(filter(None, (config.codec or "dense", config.filter_codec, config.compressor)))


DENSE = Policy(BASELINE)
ANY_MODEL = tuple(name for name, preset in PRESETS.items() if preset.codec != "deltakv")
"""Presets that every model can be served under: the others need something trained for it."""


def make_policies(
    presets: Iterable[str | Mapping[str, Any]] = ANY_MODEL, budgets: Iterable[int | float] = ()
) -> tuple[Policy, ...]:
    """Every preset at every budget, dense once and first: all else is compared with it.

    Args:
        presets: names, or mappings as `EngineConfig.sparsity` takes them; one that has a budget keeps to it.

    Raises:
        ConfigError: a preset or parameter is unknown, or a budget is not above zero.
    """
    budgets = tuple(dict.fromkeys(budgets))
    for budget in budgets:
        if not budget > 0 or (isinstance(budget, float) and budget > 1):
            raise ConfigError(f"budget {budget!r}: give tokens (a whole number above 0) or a share in (0, 1]")
    made = [DENSE]
    for given in presets:
        policy = parse_policy(given)
        if policy.budget is not None or not takes_budget(policy):
            made.append(policy)
        else:
            made += [with_budget(policy, budget) for budget in budgets] or [policy]
    return tuple(dict.fromkeys(made))


def parse_policy(given: str | Mapping[str, Any]) -> Policy:
    """A preset by name, or a mapping with 'preset' and parameters of it."""
    SparsityConfig.coerce(given)  # says what is wrong
    if isinstance(given, str):
        return Policy(given)
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Policy(changed.pop("preset"), changed.pop("budget", None), tuple(changed.items()))


def takes_budget(policy: Policy) -> bool:
    """Whether a policy reads or keeps more under a larger budget than it names."""
    config, written = SparsityConfig.coerce(policy.sparsity), [part.budget for part in parts(policy.preset, PRESETS)]
    cuts = (config.keep.method != "all") + (config.kind is not ALL)
    return policy.budget is None and cuts > sum(budget is not None for budget in written)


def with_budget(policy: Policy, budget: int | float) -> Policy:
    """The policy at this budget. Where a keep and a select are joined and neither has one, the keep keeps it and the
    select reads half of it."""
    both = [part for part in parts(policy.preset, PRESETS) if {"keep", "select"} & part.changes.keys()]
    if len(both) < 2 or any(part.budget is not None for part in both):
        return replace(policy, budget=budget)
    half = budget / 2 if isinstance(budget, float) else max(budget // 2, 1)
    shares = {part.name: f":{half if 'select' in part.changes else budget}" for part in both}
    return replace(policy, preset="+".join(name + shares.get(name, "") for name in policy.preset.split("+")))


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def by_store(policies: Iterable[Policy]) -> dict[str, tuple[Policy, ...]]:
    """The policies that one engine can serve, by how it stores pages, in their order."""
    groups: dict[str, tuple[Policy, ...]] = {}
    for policy in policies:
        groups[policy.store] = (*groups.get(policy.store, ()), policy)
    return groups
