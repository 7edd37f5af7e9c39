"""Writes random Llama-shaped checkpoints in Hugging Face format with NumPy, once per shape and dtype."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama decoder with untied embeddings."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int


M124 = Shape("m124", hidden=768, layers=12, heads=12, kv_heads=4, head_dim=64, ffn=2048, vocab=32000)
TINY = Shape("tiny", hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256)


def write(shape: Shape, dtype: str, cache: Path, seed: int = 0) -> Path:
    """The checkpoint directory, made if it is not there yet. Both dtypes hold the same numbers, rounded."""
    target = cache / f"{shape.name}-{dtype}-seed{seed}"
    if target.exists():
        return target
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: value.astype(DTYPES[dtype]) for name, value in draw(shape, seed).items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config(shape, dtype), indent=2))
    partial.rename(target)
    return target


def draw(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Every tensor, float32: norms are one, all else is normal with deviation 0.02."""
    rng = np.random.default_rng(seed)
    e, d = shape.hidden, shape.head_dim

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, dtype=np.float32) * np.float32(0.02)

    tensors = {"model.embed_tokens.weight": normal(shape.vocab, e)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": np.ones(e, np.float32),
            prefix + "self_attn.q_proj.weight": normal(shape.heads * d, e),
            prefix + "self_attn.k_proj.weight": normal(shape.kv_heads * d, e),
            prefix + "self_attn.v_proj.weight": normal(shape.kv_heads * d, e),
            prefix + "self_attn.o_proj.weight": normal(e, shape.heads * d),
            prefix + "post_attention_layernorm.weight": np.ones(e, np.float32),
            prefix + "mlp.gate_proj.weight": normal(shape.ffn, e),
            prefix + "mlp.up_proj.weight": normal(shape.ffn, e),
            prefix + "mlp.down_proj.weight": normal(e, shape.ffn),
        }
    return tensors | {"model.norm.weight": np.ones(e, np.float32), "lm_head.weight": normal(shape.vocab, e)}


def config(shape: Shape, dtype: str) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
    }
