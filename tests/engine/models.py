"""One tiny model in memory, shared by the engine tests, and engines over it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.engine.engine import Engine
from sparsejax.models.config import DecoderConfig
from sparsejax.models.files import EMBEDDED
from sparsejax.models.loaded import LoadedModel
from sparsejax.models.params import init_params
from sparsejax.models.tokenizer import load_tokenizer

VOCAB = 199
EOS = 7


@functools.cache
def tiny_model(
    window: int | None = None,
    positions: int = 512,
    vocab_size: int = VOCAB,
    eos: int = EOS,
    kv_heads: int = 2,
    layers: int = 2,
) -> LoadedModel:
    """Two `layers`, GQA (MHA with 4 `kv_heads`), float32; weights wide enough that no two logits tie."""
    config = DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=positions,
        eos_token_ids=(eos,),
        windows=(window, *(None,) * (layers - 1)),
    )
    return LoadedModel(config, init_params(config, jax.random.key(1), jnp.float32, std=0.3), None, jnp.dtype("float32"))


def tiny_engine(model: LoadedModel | None = None, tokenizer: Any = None, **overrides: Any) -> Engine:
    """Without a prefix cache unless asked for: a prompt that a test sends again is to be computed again."""
    defaults = dict(max_num_seqs=8, max_num_batched_tokens=64, page_size=16, warmup="none", num_decode_steps=1)
    defaults["enable_prefix_caching"] = False
    return Engine.from_loaded(model or tiny_model(), tokenizer, **{**defaults, **overrides})


def warm_greedy(engine: Engine) -> Engine:
    """`engine` with its programs of greedy steps compiled, where a test asks for nothing else: fewer than half."""
    runner = engine.core.runner
    if engine.core.tiers:
        engine.core.tiers.transfers.warm()
    runner.warm([key for key in runner.table.keys() if key.greedy])
    return engine


def text_engine(**overrides: Any) -> Engine:
    """A tiny model of random weights that writes the embedded model's tokens: any bytes, at any speed of a test."""
    tokenizer = load_tokenizer(EMBEDDED)
    model = tiny_model(positions=1024, vocab_size=len(tokenizer), eos=tokenizer.eos_token_id)
    defaults = dict(max_num_seqs=4, kv_memory_bytes=400_000, warmup="full", enable_prefix_caching=True)
    return tiny_engine(model, tokenizer, **{**defaults, **overrides})


def random_prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]
