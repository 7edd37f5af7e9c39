"""Attention over page lists in NumPy and float64."""

from __future__ import annotations

import numpy as np

HIDDEN = -1e30


def attend(case) -> tuple[np.ndarray, np.ndarray]:
    """Output [T, H, D] and log-sum-exp [T, H] of every query of `case` (see `suite.paged.Case`)."""
    tokens, heads, head_dim = case.q.shape
    out, lse = np.zeros((tokens, heads, head_dim)), np.full((tokens, heads), HIDDEN)
    group = heads // case.kv_heads
    for row, (first, stop) in enumerate(zip(case.starts[:-1], case.starts[1:], strict=True)):
        if stop == first:
            continue
        positions = case.lengths[row] - (stop - np.arange(first, stop))
        for kv_head in range(case.kv_heads):
            mine = slice(kv_head * group, (kv_head + 1) * group)
            k, v, at = _tokens(case, row, kv_head)
            o, log = _softmax(case, case.q[first:stop, mine], k, v, at, positions, mine)
            out[first:stop, mine], lse[first:stop, mine] = o, log
    return out, lse


def _tokens(case, row: int, kv_head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values [S, D] and positions [S] of the tokens that the list holds and the row has."""
    which = kv_head if case.page_ids.shape[1] > 1 else 0
    count = case.counts[row, which]
    ids = case.page_ids[row, which, :count]
    logical = np.arange(count) if case.logical_ids is None else case.logical_ids[row, which, :count]
    at = (logical[:, None] * case.page + np.arange(case.page)).reshape(-1)
    held = at < case.lengths[row]
    k, v = case.keys(ids, kv_head), case.values(ids, kv_head)
    return k.reshape(-1, k.shape[-1])[held], v.reshape(-1, v.shape[-1])[held], at[held]


def _softmax(case, q, k, v, at, positions, heads) -> tuple[np.ndarray, np.ndarray]:
    scores = np.einsum("tgd,sd->tgs", q.astype(np.float64), k) * case.scale
    if case.soft_cap is not None:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    newest = positions if case.own_page else positions // case.page * case.page - 1
    seen = at <= newest[:, None]
    if case.window is not None:
        seen &= at > positions[:, None] - case.window
    scores = np.where(seen[:, None], scores, -np.inf)
    sinks = np.full(scores.shape[1], -np.inf) if case.sinks is None else case.sinks[heads].astype(np.float64)
    top = np.maximum(scores.max(-1, initial=HIDDEN), sinks)
    weights = np.exp(scores - top[..., None])
    total = weights.sum(-1) + np.exp(sinks - top)
    sees = seen.any(-1)[:, None]
    out = np.where(sees[..., None], np.einsum("tgs,sd->tgd", weights, v) / np.where(sees, total, 1)[..., None], 0)
    return out, np.where(sees, top + np.log(np.where(sees, total, 1)), HIDDEN)
