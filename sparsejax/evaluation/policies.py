"""What gets compared: sparsity presets, each at several budgets, with dense first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.sparsity.policy import PRESETS, SparsityConfig

BASELINE = "dense"
PROBE = (4096, 32)
"""Prompt tokens and page size at which two budgets are compared."""


@dataclass(frozen=True)
class Policy:
    """A preset and its budget: tokens (int), a share of the prompt (float), or the preset's own (None).

    `changed` are other parameters of the preset, as pairs of name and value.
    """

    preset: str
    budget: int | float | None = None
    changed: tuple[tuple[str, Any], ...] = ()

    @property
    def method(self) -> str:
        """What is the same at all budgets."""
        return " ".join([self.preset, *(f"{name}={_brief(value)}" for name, value in self.changed)])

    @property
    def label(self) -> str:
        return self.method if self.budget is None else f"{self.method} {self.budget:g}"

    @property
    def sparsity(self) -> str | dict[str, Any]:
        """What `EngineConfig.sparsity` takes: a name, or a mapping where anything is changed."""
        budget = {} if self.budget is None else {"budget": self.budget}
        return {"preset": self.preset, **budget, **dict(self.changed)} if budget or self.changed else self.preset

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
            made += [replace(policy, budget=budget) for budget in budgets or (None,)]
    return tuple(dict.fromkeys(made))


def parse_policy(given: str | Mapping[str, Any]) -> Policy:
    """A preset by name, or a mapping with 'preset' and parameters of it."""
    SparsityConfig.coerce(given)  # says what is wrong
    if isinstance(given, str):
        return Policy(given)
    changed = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Policy(changed.pop("preset"), changed.pop("budget", None), tuple(changed.items()))


def takes_budget(policy: Policy) -> bool:
    """Whether a policy reads or keeps more under a larger budget."""
    small, large = (SparsityConfig.coerce(replace(policy, budget=tokens).sparsity) for tokens in (256, 2048))
    return _effect(small) != _effect(large)


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _effect(config: SparsityConfig) -> tuple:
    return config.page_counts(*PROBE), config.keep.eviction(PROBE[0])


def by_store(policies: Iterable[Policy]) -> dict[str, tuple[Policy, ...]]:
    """The policies that one engine can serve, by how it stores pages, in their order."""
    groups: dict[str, tuple[Policy, ...]] = {}
    for policy in policies:
        groups[policy.store] = (*groups.get(policy.store, ()), policy)
    return groups


def parse_budget(text: str) -> int | float:
    """``"2048"`` is tokens, ``"0.25"`` or ``"25%"`` a share of the prompt."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise ConfigError(f"budget {text!r}: write tokens (2048) or a share of the prompt (0.25 or 25%)") from error
