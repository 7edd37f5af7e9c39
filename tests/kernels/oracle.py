"""Attention over page lists in NumPy, float64, token by token: independent of every implementation it
judges."""

from __future__ import annotations

import numpy as np

HIDDEN = -1e30


def attend_one(case, row: int, query: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Output [H, D] and log-sum-exp [H] of one query [H, D] of `row` at `position`."""
    heads = query.shape[0]
    _, kv_heads, page_size, head_dim = case.k_pages.shape
    out, lse = np.zeros((heads, head_dim)), np.full(heads, HIDDEN)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        which = kv_head if case.page_ids.shape[1] > 1 else 0
        keys, values = [], []
        for entry in range(case.counts[row, which]):
            page = case.page_ids[row, which, entry]
            logical = entry if case.logical_ids is None else case.logical_ids[row, which, entry]
            for offset in range(page_size):
                at = logical * page_size + offset
                if at <= position and (case.window is None or at > position - case.window):
                    keys.append(case.k_pages[page, kv_head, offset])
                    values.append(case.v_pages[page, kv_head, offset])
        if not keys:
            continue
        scale = head_dim**-0.5 if case.scale is None else case.scale
        scores = np.asarray(keys, np.float64) @ query[head].astype(np.float64) * scale
        if case.soft_cap is not None:
            scores = case.soft_cap * np.tanh(scores / case.soft_cap)
        logits = scores if case.sinks is None else np.append(scores, np.float64(case.sinks[head]))
        top = logits.max()
        lse[head] = top + np.log(np.exp(logits - top).sum())
        out[head] = np.exp(scores - lse[head]) @ np.asarray(values, np.float64)
    return out, lse


def decode(case) -> tuple[np.ndarray, np.ndarray]:
    """Output [B, H, D] and log-sum-exp [B, H] of `paged_decode_attention`."""
    results = [attend_one(case, row, case.q[row], length - 1) for row, length in enumerate(case.lengths)]
    return np.stack([r[0] for r in results]), np.stack([r[1] for r in results])


def prefill(case) -> tuple[np.ndarray, np.ndarray]:
    """Output [T, H, D] and log-sum-exp [T, H] of `paged_prefill_attention`."""
    out, lse = np.zeros(case.q.shape), np.full(case.q.shape[:2], HIDDEN)
    for row, (start, stop) in enumerate(zip(case.query_starts, case.query_starts[1:], strict=False)):
        for token in range(start, stop):
            position = case.lengths[row] - (stop - token)
            out[token], lse[token] = attend_one(case, row, case.q[token], position)
    return out, lse
