"""Sliding windows of a ``config.json``, as the Qwen families spell them."""

from __future__ import annotations

from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.families.fields import Raw, number, value


def windows_from_layer_types(raw: Raw, layers: int) -> tuple[int | None, ...]:
    """``use_sliding_window`` switches windows on; ``layer_types`` or ``max_window_layers`` places them."""
    window = raw.get("sliding_window", 4096) if value(raw, "use_sliding_window", False) else None
    types = value(raw, "layer_types")
    if types is None:
        full = number(raw, "max_window_layers", 28.0)
        return tuple(window if i >= full else None for i in range(layers))
    if not isinstance(types, list):
        raise ConfigError(f"layer_types must be a list, got {types!r}")
    known = {"full_attention": None, "sliding_attention": window}
    unknown = sorted({str(kind) for kind in types} - set(known))
    if unknown:
        raise ConfigError(f"layer_types {unknown} are not supported; known: {sorted(known)}")
    return tuple(known[kind] for kind in types)


def windows_to_layer_types(cfg: DecoderConfig) -> dict[str, Any]:
    """The keys that ``windows_from_layer_types`` reads."""
    sizes = {window for window in cfg.windows if window is not None}
    if len(sizes) > 1:
        raise ConfigError(f"{cfg.architecture} holds one sliding window size, got {sorted(sizes)}")
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": next(iter(sizes), None),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in cfg.windows],
    }
