"""From a query to the pages that each row reads: scores, how many of them, and the best of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.groups import HIDDEN
from sparsejax.sparsity.blocks import Blocks, ends
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
    place = jnp.arange(query.page_ids.shape[2])
    unpinned = count[..., None] - policy.recents[:, None, None]
    middle = (place >= policy.sinks[:, None, None]) & (place < unpinned)  # [B, Kl, S]
    scores = _scores(query, policy, rows, selects, middle, heads)
    wanted = (middle & (scores > HIDDEN / 2)).sum(-1)
    wanted = jnp.minimum(wanted, _reaching(scores, policy, rows, middle, wanted, width))
    pinned = jnp.minimum((policy.sinks + policy.recents)[:, None], count)
    room = (policy.budget - policy.growth)[:, None]
    chosen = pallas_kernels.select_pages(
        scores,
        query.page_ids,
        count,
        jnp.minimum(pinned + wanted, room).astype(jnp.int32),
        width=width,
        sinks=policy.sinks,
        recents=policy.recents,
        logical_ids=query.logical_ids,
    )
    return Lists(chosen.logical_ids, chosen.counts)


def candidates(
    query: Query, policy: PolicyRows, at: Int[Array, " B"], blocks: Blocks, heads: int, width: int
) -> Query:
    """`query` over the pages of the best blocks of rows `at`, at most `width` of them, as `choose` takes pages."""
    listed = query.counts[:, 0]
    count, sinks, recents = ends(policy, listed, blocks.size)
    scores = blocks.scores(query.q, at, count - recents)
    block = jnp.arange(scores.shape[2])
    middle = (block >= sinks[:, None]) & (block < (count - recents)[:, None])
    scores = _as_shares(jnp.where(middle[:, None], scores, HIDDEN), middle[:, None], policy)
    scores = _per_list(scores, policy, heads)
    ids = jnp.broadcast_to(block.astype(jnp.int32), (len(listed), 1, len(block)))
    chosen = pallas_kernels.select_pages(
        scores, ids, count[:, None], sinks + recents + policy.blocks, width=width, sinks=sinks, recents=recents
    )
    return blocks.pages_of(chosen.logical_ids, chosen.counts, query)


def _scores(
    query: Query,
    policy: PolicyRows,
    rows: Array,
    selects: tuple[Select, ...],
    middle: Bool[Array, "B Kl S"],
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
                given = _as_shares(given, middle, policy)
            given = _per_list(given, policy, heads)
            return jnp.where(mine[:, None, None], given, scores)

        if kind.name != "all":
            scores = lax.cond(mine.any(), scored, lambda scores: scores, scores)
    return scores


def _as_shares(scores: Array, middle: Array, policy: PolicyRows) -> Array:
    """Their softmax, for rows whose scores are compared across heads or summed; -1e30 for what is pinned."""
    compared = ((policy.shared > 0) | (policy.top_p < 1))[:, None, None]
    return jnp.where(middle, jnp.where(compared, jax.nn.softmax(scores, axis=-1), scores), HIDDEN)


def _per_list(scores: Array, policy: PolicyRows, heads: int) -> Array:
    """Scores of each list out of those of each KV head: the best, where heads share one."""
    if scores.shape[1] == 1:
        return scores
    best = scores.max(1, keepdims=True)
    return best if heads == 1 else jnp.where(policy.shared[:, None, None] > 0, best, scores)


def _reaching(
    scores: Float[Array, "B Ks S"],
    policy: PolicyRows,
    rows: Bool[Array, " B"],
    middle: Bool[Array, "B Kl S"],
    wanted: Int[Array, "B Ks"],
    width: int,
) -> Int[Array, "B Ks"]:
    """The fewest pages whose shares reach the rows' `top_p` of all shares; `wanted` for rows that set none."""
    limited = rows & (policy.top_p < 1)

    def count() -> Array:
        shares = jnp.where(middle, jnp.maximum(scores, 0), 0)
        best = lax.top_k(shares, min(width, shares.shape[2]))[0]
        before = jnp.cumsum(best, axis=-1) - best
        reached = (before < policy.top_p[:, None, None] * shares.sum(-1, keepdims=True)).sum(-1)
        return jnp.where(limited[:, None], reached, wanted).astype(wanted.dtype)

    return lax.cond(limited.any(), count, lambda: wanted)
