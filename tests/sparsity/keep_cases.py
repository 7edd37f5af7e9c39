"""A small model, and rows of a step of which one evicts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sparsejax.models.config import DecoderConfig
from sparsejax.sparsity.eviction import Eviction, Keep
from sparsejax.sparsity.evictor import Evictor
from sparsejax.sparsity.keep_rows import KeepRows, pack_keep

P, ROWS, ROW, DIM = 16, 3, 1, 16
LAYERS = 2
METHODS = ("snapkv", "keydiff", "expected_attention", "rkv", "h2o", "streaming", "random")


def model(heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        family="llama", vocab_size=9, hidden_size=32, intermediate_size=8, num_layers=LAYERS, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=DIM, max_position_embeddings=512, eos_token_ids=(0,), windows=(None,) * LAYERS,
    )  # fmt: skip


def rows_with(keep: Keep, eviction: Eviction, method: int = 0) -> KeepRows:
    """Rows of which one evicts, by the method of this index."""
    values = jax.tree.map(jnp.asarray, pack_keep(keep, method, eviction))
    return KeepRows.neutral(ROWS).with_row(jnp.int32(ROW), values)


@functools.partial(jax.jit, static_argnums=0)
def evict(evictor: Evictor, *args):
    """One program for all methods, as an engine has it."""
    return evictor.evict(*args)
