"""What gets compared: sparsity presets, each at several budgets, with dense first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.sparsity.policy import PRESETS, SparsityConfig

BASELINE = "dense"
PROBE = (4096, 32)
"""Prompt tokens and page size at which two budgets are compared."""


@dataclass(frozen=True)
class Policy:
    """A preset and its budget: tokens (int), a share of the prompt (float), or the preset's own (None)."""

    preset: str
    budget: int | float | None = None

    @property
    def label(self) -> str:
        return self.preset if self.budget is None else f"{self.preset} {self.budget:g}"

    @property
    def sparsity(self) -> str | dict[str, Any]:
        """What `EngineConfig.sparsity` takes: a name, or a mapping where there is a budget."""
        return self.preset if self.budget is None else {"preset": self.preset, "budget": self.budget}

    @property
    def codec(self) -> str:
        """How pages are stored; an engine has one codec."""
        return SparsityConfig.coerce(self.sparsity).codec or "dense"


DENSE = Policy(BASELINE)
ANY_MODEL = tuple(name for name, preset in PRESETS.items() if preset.codec != "deltakv")
"""Presets that every model can be served under: the others need something trained for it."""


def make_policies(presets: Iterable[str] = ANY_MODEL, budgets: Iterable[int | float] = ()) -> tuple[Policy, ...]:
    """Every preset at every budget, dense once and first: all else is compared with it.

    Raises:
        ConfigError: a preset is unknown or a budget is not above zero.
    """
    budgets = tuple(dict.fromkeys(budgets))
    for budget in budgets:
        if not budget > 0 or (isinstance(budget, float) and budget > 1):
            raise ConfigError(f"budget {budget!r}: give tokens (a whole number above 0) or a share in (0, 1]")
    made = [DENSE]
    for preset in dict.fromkeys(presets):
        if preset not in PRESETS:
            raise ConfigError(f"preset {preset!r} is unknown; known are {', '.join(PRESETS)}")
        if not budgets or not takes_budget(preset):
            made.append(Policy(preset))
        else:
            made += [Policy(preset, budget) for budget in budgets]
    return tuple(dict.fromkeys(made))


def takes_budget(preset: str) -> bool:
    """Whether a preset reads or keeps more under a larger budget."""
    small, large = (SparsityConfig.preset(preset, budget=budget) for budget in (256, 2048))
    return _effect(small) != _effect(large)


def _effect(config: SparsityConfig) -> tuple:
    return config.page_counts(*PROBE), config.keep.eviction(PROBE[0])


def by_codec(policies: Iterable[Policy]) -> dict[str, tuple[Policy, ...]]:
    """The policies that one engine can serve, by its codec, in their order."""
    groups: dict[str, tuple[Policy, ...]] = {}
    for policy in policies:
        groups[policy.codec] = (*groups.get(policy.codec, ()), policy)
    return groups


def parse_budget(text: str) -> int | float:
    """``"2048"`` is tokens, ``"0.25"`` or ``"25%"`` a share of the prompt."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if "." in text else int(text)
    except ValueError as error:
        raise ConfigError(f"budget {text!r}: write tokens (2048) or a share of the prompt (0.25 or 25%)") from error
