"""The tensor names that Llama set and the families after it kept."""

from __future__ import annotations

from sparsejax.models.config import DecoderConfig
from sparsejax.models.families.base import Slot

_ALL = slice(None)


def standard_slots(cfg: DecoderConfig) -> list[Slot]:
    """Every tensor of a checkpoint with Llama's names; biases and norms as ``cfg`` says."""
    e, v = cfg.hidden_size, cfg.vocab_size
    slots = [Slot("model.embed_tokens.weight", (v, e), ("embed",))]
    for i in range(cfg.num_layers):
        slots += _layer(cfg, f"model.layers.{i}.", f"layers_{i}")
    slots.append(Slot("model.norm.weight", (e,), ("final_norm",)))
    if not cfg.tie_embeddings:
        slots.append(Slot("lm_head.weight", (v, e), ("lm_head",)))
    return slots


def _layer(cfg: DecoderConfig, prefix: str, layer: str) -> list[Slot]:
    e, f, d, k, g = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim, cfg.num_kv_heads, cfg.group_size
    projections = [
        ("q_proj", k * g * d, (_ALL, slice(0, g))),
        ("k_proj", k * d, (_ALL, g)),
        ("v_proj", k * d, (_ALL, g + 1)),
    ]
    slots = [Slot(prefix + "input_layernorm.weight", (e,), (layer, "attn_norm"))]
    for name, rows, index in projections:
        slots.append(Slot(f"{prefix}self_attn.{name}.weight", (rows, e), (layer, "qkv"), index))
        if cfg.qkv_bias:
            slots.append(Slot(f"{prefix}self_attn.{name}.bias", (rows,), (layer, "qkv_bias"), index))
    if cfg.qk_norm:
        slots += [
            Slot(f"{prefix}self_attn.{name}.weight", (d,), (layer, name)) for name in ("q_norm", "k_norm")
        ]
    slots.append(Slot(prefix + "self_attn.o_proj.weight", (e, k * g * d), (layer, "o")))
    if cfg.o_bias:
        slots.append(Slot(prefix + "self_attn.o_proj.bias", (e,), (layer, "o_bias")))
    slots.append(Slot(prefix + "post_attention_layernorm.weight", (e,), (layer, "mlp_norm")))
    for row, name in enumerate(("gate_proj", "up_proj")):
        slots.append(Slot(f"{prefix}mlp.{name}.weight", (f, e), (layer, "gate_up"), (row,)))
        if cfg.mlp_bias:
            slots.append(Slot(f"{prefix}mlp.{name}.bias", (f,), (layer, "gate_up_bias"), (row,)))
    slots.append(Slot(prefix + "mlp.down_proj.weight", (e, f), (layer, "down")))
    if cfg.mlp_bias:
        slots.append(Slot(prefix + "mlp.down_proj.bias", (e,), (layer, "down_bias")))
    return slots
