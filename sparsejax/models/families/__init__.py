"""Model families, one file each. To add one: write its file and name it in ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.models.families import llama, mistral, qwen2, qwen3
from sparsejax.models.families.base import Family

FAMILIES: tuple[Family, ...] = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)


def known_architectures() -> list[str]:
    """Every name that may stand in ``architectures``."""
    return sorted(name for family in FAMILIES for name in family.architectures)


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``, by its ``architectures``; ConfigError lists the known ones."""
    names = raw.get("architectures") or []
    for family in FAMILIES:
        if any(name in family.architectures for name in names):
            return family
    given = f"architectures {list(names)}" if names else "no architectures"
    raise ConfigError(f"config.json names {given}; known architectures: {', '.join(known_architectures())}")


def family_named(name: str) -> Family:
    """The family with this ``DecoderConfig.family``."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ConfigError(f"family {name!r} is unknown; known: {', '.join(f.name for f in FAMILIES)}")
