"""One tiny model in memory, shared by the engine tests, and engines over it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.engine.engine import Engine
from sparsejax.models.config import DecoderConfig
from sparsejax.models.loaded import LoadedModel
from sparsejax.models.params import init_params

VOCAB = 199
EOS = 7


@functools.cache
def tiny_model(window: int | None = None, positions: int = 512, kv_heads: int = 2) -> LoadedModel:
    """Two layers, GQA, or MHA with 4 `kv_heads`, float32; weights wide enough that no two logits tie."""
    config = DecoderConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=positions,
        eos_token_ids=(EOS,),
        windows=(window, None),
    )
    return LoadedModel(config, init_params(config, jax.random.key(1), jnp.float32, std=0.3), None, jnp.dtype("float32"))


def tiny_engine(model: LoadedModel | None = None, tokenizer: Any = None, **overrides: Any) -> Engine:
    defaults = dict(max_num_seqs=8, max_num_batched_tokens=64, page_size=16, warmup="none", num_decode_steps=1)
    return Engine.from_loaded(model or tiny_model(), tokenizer, **{**defaults, **overrides})


def random_prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]
