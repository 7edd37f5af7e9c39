"""What a keep may look at, and passes over it that follow the row's length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels import layouts

BLOCK = 16
"""Pages that a pass holds at once."""

type Tables = Callable[[Array], tuple[Array, Array]]


class View(NamedTuple):
    """The cache of one row in one layer, about to be cut.

    Attributes:
        k_pages, v_pages: pools in the model's dtype, with what coded pages decode to.
        page_ids: ids in them ``[S]`` of the row's pages.
        length: tokens in them.
        queries: observed queries ``[W, H, D]`` before rotation, at `positions` ``[W]``; -1 where there is none.
        mass: probability that all queries gave to each token slot of the row's pages, ``[K, U]``; None where no
            declared method counts it.
        future: the first position of queries that are to come.
        pool: neighbours over which scores are averaged.
        rope: ``rope(positions [T])`` gives cos and sin ``[T, D / 2]`` of the model's rotation.
        options: `soft_cap` and `implementation` of the layer's attention.
    """

    k_pages: Array
    v_pages: Array | None
    page_ids: Array
    length: Array
    queries: Array
    positions: Array
    mass: Array | None
    future: Array
    pool: int
    rope: Tables
    options: dict[str, Any]

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[2]

    @property
    def head_dim(self) -> int:
        return self.queries.shape[-1]

    @property
    def groups(self) -> int:
        """Query heads of a KV head."""
        return self.queries.shape[1] // self.k_pages.shape[1]


def live_tokens(view: View) -> Bool[Array, " U"]:
    """Which token slots of the row's pages hold a token."""
    return jnp.arange(view.page_ids.shape[0] * view.page_size) < view.length


def over_blocks[Carry](view: View, body: Callable[[Carry, Array, Array, Array, Array], Carry], carry: Carry) -> Carry:
    """Folds ``body(carry, first slot, keys [K, n, D], values [K, n, D], live [n])`` over the row's tokens.

    Keys and values of slots without a token are zero.
    """
    size = min(BLOCK, view.page_ids.shape[0])
    page_ids = jnp.pad(view.page_ids, (0, -view.page_ids.shape[0] % size))
    tokens = size * view.page_size
    head = jnp.arange(view.k_pages.shape[1])[:, None]

    def step(i: Array, carry: Carry) -> Carry:
        ids = lax.dynamic_slice(page_ids, (i * size,), (size,))
        live = i * tokens + jnp.arange(tokens) < view.length
        tiles = (
            pool.at[ids, head].get(mode="clip")[..., columns].reshape(head.shape[0], tokens, view.head_dim)
            for pool, columns in layouts.columns(view.k_pages, view.v_pages, view.head_dim)
        )
        k, v = (jnp.where(live[:, None], tile, 0).astype(jnp.float32) for tile in tiles)
        return body(carry, i * tokens, k, v, live)

    return lax.fori_loop(0, (view.length + tokens - 1) // tokens, step, carry)


def by_token(
    view: View, score: Callable[[Array, Array], Float[Array, "R n"]], rows: int
) -> Float[Array, "R U"]:
    """``score(keys [K, n, D], values [K, n, D])`` of every token of the row, ``rows`` numbers each; 0 elsewhere."""
    slots = view.page_ids.shape[0] * view.page_size
    tokens = min(BLOCK, view.page_ids.shape[0]) * view.page_size

    def body(out: Array, first: Array, k: Array, v: Array, live: Array) -> Array:
        return lax.dynamic_update_slice(out, jnp.where(live, score(k, v), 0), (0, first))

    return over_blocks(view, body, jnp.zeros((rows, -(-slots // tokens) * tokens)))[:, :slots]


def smooth(scores: Float[Array, "K U"], pool: int) -> Float[Array, "K U"]:
    """The mean over `pool` neighbours of each token."""
    return lax.reduce_window(scores, 0.0, lax.add, (1, pool), (1, 1), "SAME") / pool
