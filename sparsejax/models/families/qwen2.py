"""Qwen2 and Qwen2.5: biases on q, k and v, and sliding windows on the upper layers when switched on."""

from __future__ import annotations

from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.families.base import Family, decode_common
from sparsejax.models.families.fields import Raw, integer
from sparsejax.models.families.tensors import standard_slots
from sparsejax.models.families.window_fields import windows_from_layer_types, windows_to_layer_types


def _decode(raw: Raw) -> DecoderConfig:
    return decode_common(
        raw,
        "qwen2",
        "Qwen2ForCausalLM",
        qkv_bias=True,
        windows=windows_from_layer_types(raw, integer(raw, "num_hidden_layers")),
        max_position_embeddings=integer(raw, "max_position_embeddings", 32768),
    )


def _encode(cfg: DecoderConfig) -> dict[str, Any]:
    if not cfg.qkv_bias or cfg.o_bias or cfg.mlp_bias or cfg.qk_norm:
        raise ConfigError("the qwen2 format has biases on q, k and v, none elsewhere, and no q/k norm")
    return windows_to_layer_types(cfg)


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), "qwen2", _decode, _encode, standard_slots)
