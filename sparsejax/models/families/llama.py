"""Llama 2, 3 and 3.1, and the many checkpoints that keep their architecture."""

from __future__ import annotations

from typing import Any

from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.families.base import Family, decode_common
from sparsejax.models.families.fields import Raw, value
from sparsejax.models.families.tensors import standard_slots


def _decode(raw: Raw) -> DecoderConfig:
    bias = bool(value(raw, "attention_bias", False))
    mlp_bias = bool(value(raw, "mlp_bias", False))
    return decode_common(raw, "llama", "LlamaForCausalLM", qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def _encode(cfg: DecoderConfig) -> dict[str, Any]:
    if any(cfg.windows) or cfg.qk_norm or cfg.qkv_bias != cfg.o_bias:
        raise ConfigError(
            "the llama format has no sliding window, no q/k norm and biases on all of q, k, v, o or none"
        )
    return {"attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}


FAMILY = Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), "llama", _decode, _encode, standard_slots)
