"""Mistral: Llama's layers with one sliding window on all of them, or none."""

from __future__ import annotations

from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.families.base import Family, decode_common
from sparsejax.models.families.fields import Raw, integer
from sparsejax.models.families.tensors import standard_slots


def _decode(raw: Raw) -> DecoderConfig:
    window = raw.get("sliding_window", 4096)  # null switches it off, an absent key is the family's default
    layers = integer(raw, "num_hidden_layers")
    return decode_common(
        raw,
        "mistral",
        "MistralForCausalLM",
        windows=(window,) * layers,
        num_kv_heads=integer(raw, "num_key_value_heads", 8),
        max_position_embeddings=integer(raw, "max_position_embeddings", 131072),
    )


def _encode(cfg: DecoderConfig) -> dict[str, Any]:
    if len(set(cfg.windows)) > 1 or cfg.qk_norm or cfg.qkv_bias or cfg.o_bias or cfg.mlp_bias:
        raise ConfigError("the mistral format has one window for all layers, no q/k norm and no biases")
    return {"sliding_window": cfg.windows[0]}


FAMILY = Family("mistral", ("MistralForCausalLM",), "mistral", _decode, _encode, standard_slots)
