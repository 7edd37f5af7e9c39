"""Bytes of key bounds that a decode step reads to select: what an engine's own count of bytes read leaves out."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from sparsejax.cache.group import CacheGroup
from sparsejax.engine.engine import Engine
from sparsejax.sparsity.blocks import ends, pays
from sparsejax.sparsity.policy import Role, SparsityConfig, selects_of
from sparsejax.sparsity.rows import PolicyRows, pack_policy


def bounds_bytes(engine: Engine, policy: SparsityConfig, num_prompt: int, pages: float) -> float:
    """Bytes per decode step of a request served alone, the mean over the steps that a list serves.

    Args:
        policy: that of the request, with the model's own filter layers.
        num_prompt: its prompt tokens, of which budgets are shares.
        pages: that a layer holds of it, the mean over its decode steps.
    """
    size = engine.config.page_size
    if not policy.kind.bounds or policy.page_counts(num_prompt, size).budget >= pages:
        return 0.0
    whole = CacheGroup.of_all(engine.core.runner.state.kv.groups)
    selecting = policy.layer_roles(len(whole.layers)).count(Role.SELECT)
    layout = whole.layout
    each = 2 * layout.num_kv_heads * layout.head_dim * np.dtype(layout.dtype).itemsize
    return selecting * scored(policy, num_prompt, size, pages) * each / policy.interval


def scored(policy: SparsityConfig, num_prompt: int, page_size: int, pages: float) -> float:
    """Bounds that a selection among `pages` pages reads: those of all pages, or of blocks of them and then of the pages
    in the best blocks. Making blocks, once for each, is left out, as making bounds is."""
    if not policy.block:
        return pages
    row = pack_policy(dataclasses.replace(policy, filter_layers=None), num_prompt, page_size, selects_of((policy,)), 1)
    row, listed = PolicyRows(**{name: jnp.asarray(value)[None] for name, value in row.items()}), round(pages)
    if not pays(row, jnp.array([listed]), policy.block)[0]:
        return pages
    blocks, sinks, recents = (int(count[0]) for count in ends(row, jnp.array([listed]), policy.block))
    opened = min(blocks, sinks + recents + int(row.blocks[0]))
    return blocks - recents + opened * policy.block - -listed % policy.block
