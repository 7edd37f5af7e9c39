"""From a query to the pages that each row reads: scores, how many of them, and the best of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.groups import HIDDEN
from sparsejax.sparsity.kinds import Select
from sparsejax.sparsity.lists import Lists
from sparsejax.sparsity.rows import PolicyRows
from sparsejax.sparsity.select import SCORES, Query


def choose(
    query: Query, policy: PolicyRows, rows: Bool[Array, " B"], selects: tuple[Select, ...], heads: int, width: int
) -> Lists:
    """Lists of the rows that `rows` names; those of the others mean nothing.

    A select that none of them uses costs nothing.
    """
    count = query.counts
    pages = jnp.arange(query.page_ids.shape[2])
    middle = (pages >= policy.sinks[:, None]) & (pages < count - policy.recents[:, None])  # [B, S], not pinned
    scores = _scores(query, policy, rows, selects, middle[:, None], heads)
    wanted = (middle[:, None] & (scores > HIDDEN / 2)).sum(-1)
    wanted = jnp.minimum(wanted, _reaching(scores, policy, rows, middle, wanted, width))
    pinned = jnp.minimum(policy.sinks + policy.recents, count[:, 0])
    room = (policy.budget - policy.growth)[:, None]
    chosen = pallas_kernels.select_pages(
        scores,
        query.page_ids,
        count,
        jnp.minimum(pinned[:, None] + wanted, room).astype(jnp.int32),
        width=width,
        sinks=policy.sinks,
        recents=policy.recents,
    )
    return Lists(chosen.logical_ids, chosen.counts)


def _scores(
    query: Query,
    policy: PolicyRows,
    rows: Array,
    selects: tuple[Select, ...],
    middle: Bool[Array, "B 1 S"],
    heads: int,
) -> Float[Array, "B Ks S"]:
    """Scores of every select for its own rows, -1e30 for what is pinned; shares where there is a distribution."""
    scores = jnp.zeros((rows.shape[0], heads, middle.shape[2]))
    for place, kind in enumerate(selects):
        mine = rows & (policy.kind == place)

        def scored(scores: Array, mine: Array = mine, kind: Select = kind) -> Array:
            given = (kind.function or SCORES[kind.name])(query, policy).astype(jnp.float32)
            given = jnp.where(middle, given, HIDDEN)
            if kind.units == "logits":
                given = jnp.where(_needs_shares(policy)[:, None, None], jax.nn.softmax(given, axis=-1), given)
                given = jnp.where(middle, given, HIDDEN)
            if given.shape[1] > 1:
                best = given.max(1, keepdims=True)
                given = best if heads == 1 else jnp.where(policy.shared[:, None, None] > 0, best, given)
            return jnp.where(mine[:, None, None], given, scores)

        if kind.name != "all":
            scores = lax.cond(mine.any(), scored, lambda scores: scores, scores)
    return scores


def _needs_shares(policy: PolicyRows) -> Bool[Array, " B"]:
    """Rows whose scores are compared across heads or summed."""
    return (policy.shared > 0) | (policy.top_p < 1)


def _reaching(
    scores: Float[Array, "B Ks S"],
    policy: PolicyRows,
    rows: Bool[Array, " B"],
    middle: Bool[Array, "B S"],
    wanted: Int[Array, "B Ks"],
    width: int,
) -> Int[Array, "B Ks"]:
    """The fewest pages whose shares reach the rows' `top_p` of all shares; `wanted` for rows that set none."""
    limited = rows & (policy.top_p < 1)

    def count() -> Array:
        shares = jnp.where(middle[:, None], jnp.maximum(scores, 0), 0)
        best = lax.top_k(shares, min(width, shares.shape[2]))[0]
        before = jnp.cumsum(best, axis=-1) - best
        reached = (before < policy.top_p[:, None, None] * shares.sum(-1, keepdims=True)).sum(-1)
        return jnp.where(limited[:, None], reached, wanted).astype(wanted.dtype)

    return lax.cond(limited.any(), count, lambda: wanted)
