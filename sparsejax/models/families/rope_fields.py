"""Rotary settings of a ``config.json``, in its old and new spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.models.config import ROPE_KINDS, RopeConfig
from sparsejax.models.families.fields import Raw, integer, needed_number, number, value


def rope_from(raw: Raw) -> RopeConfig:
    """Rotary settings from ``rope_parameters`` (new) or ``rope_theta`` and ``rope_scaling`` (old)."""
    table = value(raw, "rope_scaling") or value(raw, "rope_parameters") or {}
    if not isinstance(table, Mapping):
        raise ConfigError(f"rope_parameters must be an object, got {table!r}")
    if table and all(isinstance(entry, Mapping) for entry in table.values()):
        kinds = list(table.values())
        if any(kind != kinds[0] for kind in kinds):
            raise ConfigError(
                f"rope_parameters that differ between layer types are not supported: {dict(table)}"
            )
        table = kinds[0]
    kind = value(table, "rope_type", value(table, "type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope type {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}")
    partial = number(table, "partial_rotary_factor", number(raw, "partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor must be 1 (the whole head rotates), got {partial}")
    theta = number(table, "rope_theta", number(raw, "rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=needed_number(table, "factor"))
    longest = integer(raw, "max_position_embeddings", 2048)
    inner = integer(table, "original_max_position_embeddings", longest)
    original = integer(raw, "original_max_position_embeddings", inner)
    if kind == "llama3":
        return RopeConfig(
            kind="llama3",
            theta=theta,
            factor=needed_number(table, "factor"),
            original_max_position=original,
            low_freq_factor=needed_number(table, "low_freq_factor"),
            high_freq_factor=needed_number(table, "high_freq_factor"),
        )
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=number(table, "factor", longest / original),
        original_max_position=original,
        beta_fast=number(table, "beta_fast") or 32.0,
        beta_slow=number(table, "beta_slow") or 1.0,
        truncate=bool(value(table, "truncate", True)),
        attention_factor=number(table, "attention_factor"),
        mscale=number(table, "mscale"),
        mscale_all_dim=number(table, "mscale_all_dim"),
    )


def rope_to(rope: RopeConfig) -> dict[str, Any]:
    """``rope_parameters`` of a configuration: the inverse of ``rope_from``."""
    table: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        table["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        table["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        table |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        table |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        table |= {name: getattr(rope, name) for name in optional if getattr(rope, name) is not None}
    return table
