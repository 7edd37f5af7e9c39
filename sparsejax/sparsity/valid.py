"""Checks of the parameters of a policy, one by one and together. Imports no JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsejax.errors import ConfigError
from sparsejax.sparsity.kinds import ALL, SELECTS

if TYPE_CHECKING:
    from sparsejax.sparsity.policy import SparsityConfig

PLAIN_CODECS = ("dense", "int8", "fp8", "int4")
CODECS = (*PLAIN_CODECS, "deltakv")
ESTIMATING = ", ".join(repr(name) for name, select in SELECTS.items() if select.units != "rank")


def integer(name: str, value: Any, least: int) -> None:
    """Requires an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} must be an integer of at least {least}.")


def share(name: str, value: Any) -> None:
    """Requires a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"{name}={value!r}: give a share in (0, 1].")


def budget(value: Any) -> None:
    """Requires tokens as an integer or a share as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"budget={value!r}: give tokens (an integer) or a share of the prompt (a float).")
    if isinstance(value, float) and value > 1:
        raise ConfigError(f"budget={value!r}: a share lies in (0, 1]; give an integer for tokens.")


def layers(value: Any) -> tuple[int, ...] | str | None:
    """Filter layers as a tuple, ``"auto"`` or None."""
    if value is None or value == "auto":
        return value
    given = tuple(value) if isinstance(value, (list, tuple)) else ()
    plain = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in given)
    if not given or not plain or list(given) != sorted(set(given)):
        raise ConfigError(
            f"filter_layers={value!r}: give layer numbers in ascending order such as (0, 4, 9), 'auto', or None "
            "for every layer."
        )
    return given


def codec(value: Any) -> None:
    """Requires a known way to store pages, or None."""
    if value is not None and value not in CODECS:
        raise ConfigError(f"codec={value!r} is not one of {', '.join(map(repr, CODECS))}.")


def filter_codec(value: Any) -> None:
    """Requires a codec that needs no compressor, or None."""
    if value is not None and value not in PLAIN_CODECS:
        raise ConfigError(f"filter_codec={value!r} is not one of {', '.join(map(repr, PLAIN_CODECS))}.")


def _of_latents(config: SparsityConfig) -> list[str]:
    """Why parameters do not go with the codec ``deltakv``, or need it."""
    if config.codec != "deltakv":
        given = [name for name in ("compressor", "filter_codec") if getattr(config, name) is not None]
        return [f"{name}={getattr(config, name)!r} belongs to codec='deltakv'; leave it out." for name in given]
    reasons = []
    if config.keep.method != "all":
        reasons.append(
            f"keep={config.keep.name!r} does not go with codec='deltakv', whose pages refer to each other by their "
            "places in the sequence: evict nothing, or take another codec."
        )
    if config.kind is not ALL and config.filter_layers is None:
        reasons.append(
            f"select={config.kind.name!r} in every layer does not go with codec='deltakv': layers of latents cannot "
            "select. Give filter_layers='auto'."
        )
    if config.recall_every:
        reasons.append(
            f"recall_every={config.recall_every}: layers of latents read no more than they are told, so nothing can be "
            "measured under codec='deltakv'; leave it out."
        )
    return reasons


def refusals(config: SparsityConfig) -> list[str]:
    """Why parameters do not go together, one reason each; empty where they do."""
    kind, reasons = config.kind, _of_latents(config)
    name, ranks = repr(kind.name), kind.units == "rank"
    cheap = ranks and kind.function is None
    if kind is ALL and config.dense_layers:
        reasons.append(f"dense_layers={config.dense_layers}: select={name} reads all in every layer; leave it at 0.")
    if kind is ALL and config.recall_every:
        reasons.append(f"recall_every={config.recall_every}: select={name} reads all; leave it out.")
    if config.recall_floor and not config.recall_every:
        reasons.append(f"recall_floor={config.recall_floor}: recall is not measured; give recall_every.")
    if config.keep.beta > 1 and config.filter_layers is not None:
        reasons.append(
            f"filter_layers={config.filter_layers!r}: lists of pages pass from layer to layer, but with "
            f"beta={config.keep.beta:g} layers hold different numbers of pages; leave one of them out."
        )
    if isinstance(config.filter_layers, tuple) and config.filter_layers[0] < config.dense_layers:
        reasons.append(
            f"dense_layers={config.dense_layers}: layer {config.filter_layers[0]} reads everything, so it cannot be in "
            f"filter_layers={config.filter_layers}; let them begin at {config.dense_layers}, or give dense_layers=0."
        )
    if config.stride is not None and kind is not SELECTS["strided"]:
        reasons.append(f"stride={config.stride}: only select='strided' reads every n-th page; leave it out.")
    if config.top_p < 1 and ranks:
        reasons.append(
            f"top_p={config.top_p}: select={name} estimates no attention probability that could reach it; leave top_p "
            f"at 1, or select by {ESTIMATING}."
        )
    if config.filter_layers is not None and cheap:
        reasons.append(
            f"filter_layers={config.filter_layers!r}: select={name} makes the same list in every layer, so there is "
            f"nothing to reuse; leave it out, or select by {ESTIMATING}."
        )
    if config.interval > 1 and cheap:
        reasons.append(
            f"interval={config.interval}: select={name} costs nothing to select anew in every step; leave it at 1."
        )
    if config.block and kind is not SELECTS["quest"]:
        reasons.append(
            f"block={config.block}: select={name} reads no bounds of pages that those of blocks would limit; leave it "
            "at 0, or select by 'quest'."
        )
    if kind is SELECTS["omnikv"] and config.filter_layers is None:
        reasons.append(
            "select='omnikv' reads everything where it selects, which pays only if other layers reuse the lists: "
            "give filter_layers ('auto' or a tuple), or take select='oracle' to measure."
        )
    return reasons
