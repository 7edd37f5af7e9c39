"""Qwen3 (dense): a norm on every q and k head instead of Qwen2's biases."""

from __future__ import annotations

from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.families.base import Family, decode_common
from sparsejax.models.families.fields import Raw, integer, value
from sparsejax.models.families.tensors import standard_slots
from sparsejax.models.families.window_fields import windows_from_layer_types, windows_to_layer_types


def _decode(raw: Raw) -> DecoderConfig:
    bias = bool(value(raw, "attention_bias", False))
    return decode_common(
        raw,
        "qwen3",
        "Qwen3ForCausalLM",
        head_dim=integer(raw, "head_dim", 128),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        windows=windows_from_layer_types(raw, integer(raw, "num_hidden_layers")),
        max_position_embeddings=integer(raw, "max_position_embeddings", 32768),
    )


def _encode(cfg: DecoderConfig) -> dict[str, Any]:
    if not cfg.qk_norm or cfg.mlp_bias or cfg.qkv_bias != cfg.o_bias:
        raise ConfigError(
            "the qwen3 format has q/k norms, no mlp bias and biases on all of q, k, v, o or none"
        )
    return {"attention_bias": cfg.qkv_bias} | windows_to_layer_types(cfg)


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), "qwen3", _decode, _encode, standard_slots)
