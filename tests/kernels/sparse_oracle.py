"""What pages score, hold and weigh, in NumPy and float64, one query after the other."""

from __future__ import annotations

import numpy as np

from . import oracle

REDUCTIONS = {"max": np.max, "mean": np.mean, "sum": np.sum}
HIDDEN = oracle.HIDDEN


def page_scores(q, low, high, page_ids, counts, group: str, scale: float | None) -> np.ndarray:
    """Upper bounds [B, K, S] from minima and maxima [N, K, D]."""
    rows, heads, head_dim = q.shape
    kv_heads = low.shape[1]
    scores = np.full((rows, kv_heads, page_ids.shape[2]), HIDDEN)
    queries = q.astype(np.float64).reshape(rows, kv_heads, -1, head_dim)
    scale = head_dim**-0.5 if scale is None else scale
    for row, head in np.ndindex(rows, kv_heads):
        which = min(head, page_ids.shape[1] - 1)
        for entry in range(counts[row, which]):
            page = page_ids[row, which, entry]
            products = [queries[row, head] * bound[page, head].astype(np.float64) for bound in (low, high)]
            scores[row, head, entry] = REDUCTIONS[group](np.maximum(*products).sum(-1) * scale)
    return scores


def pinned_entries(row: int, count: int, width: int, sinks, recents) -> list[int]:
    """The entries of a list of `count` pages that are selected whatever they score."""
    recent = min(1 if recents is None else recents[row], count, width)
    sink = min(0 if sinks is None else sinks[row], count - recent, width - recent)
    return [*range(sink), *range(count - recent, count)]


def select(scores, page_ids, counts, budgets, width, sinks, recents, logical_ids):
    """The selection of each list: [B][Ks] lists of (page id, logical id)."""
    rows, lists, _ = scores.shape
    chosen = [[[] for _ in range(lists)] for _ in range(rows)]
    for row, which in np.ndindex(rows, lists):
        column = min(which, page_ids.shape[1] - 1)
        count = int(counts[row, column])
        pinned = pinned_entries(row, count, width, sinks, recents)
        budget = budgets[row, which] if budgets.ndim == 2 else budgets[row]
        room = min(max(budget, len(pinned)), count, width) - len(pinned)
        others = sorted((e for e in range(count) if e not in pinned), key=lambda e: (-scores[row, which, e], e))
        for entry in sorted(pinned + others[:room]):
            logical = entry if logical_ids is None else logical_ids[row, column, entry]
            chosen[row][which].append((page_ids[row, column, entry], logical))
    return chosen


def mass(case, keys, lse, group: str, per_token: bool) -> np.ndarray:
    """Probability mass [B, K, S, P] or [B, K, S] under `lse` [T, H]; `keys` [N, K, P, D] in float64."""
    rows = len(case.lengths)
    kv_heads, page_size = keys.shape[1:3]
    scale = keys.shape[3] ** -0.5 if case.scale is None else case.scale
    width = case.page_ids.shape[2]
    total = np.zeros((rows, kv_heads, width, page_size) if per_token else (rows, kv_heads, width))
    starts = np.arange(rows + 1) if case.query_starts is None else case.query_starts
    for row in range(rows):
        for token in range(starts[row], starts[row + 1]):
            position = case.lengths[row] - (starts[row + 1] - token)
            for head in range(kv_heads):
                which = min(head, case.page_ids.shape[1] - 1)
                queries = case.q[token].astype(np.float64).reshape(kv_heads, -1, keys.shape[3])[head]
                norms = lse[token].reshape(kv_heads, -1)[head][:, None]
                for entry in range(case.counts[row, which]):
                    logical = entry if case.logical_ids is None else case.logical_ids[row, which, entry]
                    slots = logical * page_size + np.arange(page_size)
                    seen = slots <= position
                    if case.window is not None:
                        seen &= slots > position - case.window
                    scores = queries @ np.where(seen[:, None], keys[case.page_ids[row, which, entry], head], 0).T
                    scores *= scale
                    if case.soft_cap is not None:
                        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
                    given = np.where(seen, np.exp(np.where(seen, scores - norms, 0)), 0)  # [G, P]
                    given = given if per_token else given.sum(-1)
                    total[row, head, entry] += REDUCTIONS[group](given, axis=0)
    return total


TOP = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}


def scale_of(values: np.ndarray, codec: str, axis: int, scale_dtype):
    """Scale and zero (None but for int4) of pages [.., P, D] with one group along `axis`."""
    low, high = values.min(axis), values.max(axis)
    span = high - low if codec == "int4" else np.maximum(-low, high)
    zero = low.astype(scale_dtype) if codec == "int4" else None
    return (span / TOP[codec]).astype(scale_dtype), zero


def ratios(values: np.ndarray, codec: str, axis: int, scale, zero) -> np.ndarray:
    """What the codes of float64 values should be, before rounding, under a scale and zero as stored."""
    scale = np.expand_dims(scale.astype(np.float64), axis)
    offset = values if zero is None else values - np.expand_dims(zero.astype(np.float64), axis)
    lowest = 0 if codec == "int4" else -TOP[codec]
    return np.clip(offset / np.where(scale > 0, scale, 1), lowest, TOP[codec])
