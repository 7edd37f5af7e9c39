"""Tiny random checkpoints in the Hugging Face layout, from a seed and the tensor names alone.

NumPy only: both the tests and the transformers environment of ``scripts/make_golden.py`` import it. Tensor
names, ``config.json`` keys and the file format are written out here, so that they check the loader's.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.cases import ARCHITECTURES

VOCAB = 128
PROMPT_LENGTHS = (5, 33, 1, 80, 18, 57)
NEW_TOKENS = 32


def hidden_size(case: dict[str, Any]) -> int:
    """Equal to heads x head dim where ``config.json`` gives no head dim, else 64 so that the two differ."""
    heads, _, dim = case["heads"]
    return 64 if case["config"].get("head_dim") and case["family"] != "llama" else heads * dim


def config_json(case: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a case."""
    heads, kv_heads, _ = case["heads"]
    config = {
        "architectures": [ARCHITECTURES[case["family"]]],
        "model_type": case["family"],
        "vocab_size": VOCAB,
        "hidden_size": hidden_size(case),
        "intermediate_size": 96,
        "num_hidden_layers": case.get("layers", 2),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": case["tied"],
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if "torch_dtype" not in case["config"]:
        config["dtype"] = case.get("storage", "float32")
    return config | case["config"]


def tensor_shapes(case: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a case."""
    heads, kv_heads, dim = case["heads"]
    config, family, hidden = case["config"], case["family"], hidden_size(case)
    qkv_bias = family == "qwen2" or config.get("attention_bias", False)
    o_bias = family != "qwen2" and config.get("attention_bias", False)
    linears = {
        "self_attn.q_proj": (heads * dim, hidden, qkv_bias),
        "self_attn.k_proj": (kv_heads * dim, hidden, qkv_bias),
        "self_attn.v_proj": (kv_heads * dim, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, heads * dim, o_bias),
        "mlp.gate_proj": (96, hidden, config.get("mlp_bias", False)),
        "mlp.up_proj": (96, hidden, config.get("mlp_bias", False)),
        "mlp.down_proj": (hidden, 96, config.get("mlp_bias", False)),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for i in range(case.get("layers", 2)):
        prefix = f"model.layers.{i}."
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        if family == "qwen3":
            shapes[f"{prefix}self_attn.q_norm.weight"] = (dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (dim,)
    shapes["model.norm.weight"] = (hidden,)
    if not case["tied"]:
        shapes["lm_head.weight"] = (VOCAB, hidden)
    return shapes


def tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One random float32 tensor; the scales spread attention and logits so that near ties are rare."""
    draws = np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        return (1 + 0.2 * draws).astype(np.float32)
    if name.endswith(".bias"):
        return (0.3 * draws).astype(np.float32)
    gains = {
        "q_proj": 1.5,
        "k_proj": 1.5,
        "v_proj": 1.5,
        "o_proj": 1.5,
        "down_proj": 3.0,
        "embed_tokens": 3.0,
        "lm_head": 4.0,
    }
    gain = gains.get(name.split(".")[-2], 1.0)
    return (gain / np.sqrt(shape[-1]) * draws).astype(np.float32)


def tensors(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor of a case as it is stored; uint16 stands for bfloat16."""
    seed = case.get("seed", 0)
    weights = {name: tensor(name, shape, seed) for name, shape in tensor_shapes(case).items()}
    if case.get("storage") == "bfloat16":
        return {name: bfloat16_bits(array) for name, array in weights.items()}
    return weights


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def prompts(case: dict[str, Any]) -> list[list[int]]:
    """Six random prompts of mixed lengths."""
    random = np.random.RandomState(case.get("seed", 0) + 1)
    return [random.randint(0, VOCAB, length).tolist() for length in PROMPT_LENGTHS]


def save_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    """The file format: header length, JSON header, then the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in weights.items():
        start, end = end, end + array.nbytes
        dtype = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int32": "I32"}[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in weights.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_shards(path: Path, weights: dict[str, np.ndarray], shards: int) -> None:
    """One file, or several with an index and names dealt out round-robin, which splits fused groups."""
    if shards == 1:
        save_safetensors(path / "model.safetensors", weights)
        return
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(weights)}
    for file in names:
        held = {name: weights[name] for name in weights if weight_map[name] == file}
        save_safetensors(path / file, held)
    total = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(path: Path, case: dict[str, Any]) -> Path:
    """Writes a case's ``config.json`` and weights into ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_json(case), indent=1))
    write_shards(path, tensors(case), case.get("shards", 1))
    return path
