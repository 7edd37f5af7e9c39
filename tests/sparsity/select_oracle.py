"""What each select reads, in NumPy and float64, one list after the other, from the formulas of the papers."""

from __future__ import annotations

import numpy as np


def quest_bounds(q: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Upper bounds [K, S] of q [H, D] with the keys [S, K, P, D] of each page: the largest in the group."""
    pages, heads, _, dim = keys.shape
    groups = q.reshape(heads, -1, dim)
    low, high = keys.min(2), keys.max(2)  # [S, K, D]
    products = np.maximum(groups[None] * low[:, :, None], groups[None] * high[:, :, None]).sum(-1)
    return products.max(2).T / np.sqrt(dim)


def probabilities(q: np.ndarray, keys: np.ndarray, length: int) -> np.ndarray:
    """Attention probability [H, S] of each page."""
    pages, heads, size, dim = keys.shape
    groups = q.reshape(heads, -1, dim)
    logits = np.einsum("kgd,skpd->kgsp", groups, keys) / np.sqrt(dim)
    logits = logits.reshape(len(q), -1)
    logits[:, length:] = -np.inf
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).reshape(len(q), pages, size).sum(-1)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-np.inf))
    return weights / weights.sum(-1, keepdims=True)


def best(scores: np.ndarray, count: int, budget: int, sinks: int, recents: int, top_p: float = 1.0) -> list[int]:
    """The pages of one list: pinned ones and the best others by score; of equal ones the earlier."""
    pinned = {*range(min(sinks, count)), *range(max(count - recents, 0), count)}
    middle = [page for page in range(count) if page not in pinned and scores[page] > -np.inf]
    order = sorted(middle, key=lambda page: (-scores[page], page))
    room = budget - len(pinned)
    if top_p < 1:
        total = sum(scores[page] for page in middle)
        reached = [page for i, page in enumerate(order) if sum(scores[p] for p in order[:i]) < top_p * total]
        room = min(room, len(reached))
    return sorted(pinned | set(order[: max(room, 0)]))
