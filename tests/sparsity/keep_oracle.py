"""What each keep should choose, in plain NumPy from the papers' formulas: float64, whole arrays, no pages."""

from __future__ import annotations

import numpy as np


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def rotate(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """x [T, H, D] turned at its positions."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def window_attention(queries: np.ndarray, keys: np.ndarray, pool: int) -> np.ndarray:
    """SnapKV: queries [W, H, D] rotated, the last ones; keys [n, K, D]. Scores [K, n]."""
    (size, heads, dim), (length, kv_heads, _) = queries.shape, keys.shape
    scores = np.zeros((kv_heads, length))
    for head in range(heads):
        logits = queries[:, head] @ keys[:, head * kv_heads // heads].T / np.sqrt(dim)
        hidden = np.arange(length)[None] > length - size + np.arange(size)[:, None]
        given = softmax(np.where(hidden, -np.inf, logits))
        scores[head * kv_heads // heads] += given.sum(0) / (heads // kv_heads)
    padded = np.pad(scores, ((0, 0), (pool // 2, pool // 2)))
    return np.stack([padded[:, i : i + length] for i in range(pool)]).mean(0)


def likeness(keys: np.ndarray) -> np.ndarray:
    """KeyDiff: cosine of each key [n, K, D] with the mean of the unit keys. [K, n]."""
    mean = unit(unit(keys).mean(0))
    return np.einsum("nkd,kd->kn", unit(keys), mean)


def redundancy_aware(queries: np.ndarray, keys: np.ndarray, pool: int) -> np.ndarray:
    """R-KV with the mean cosine as redundancy."""
    attention = window_attention(queries, keys, pool)
    attention /= attention.sum(-1, keepdims=True)
    return 0.1 * attention - 0.9 * softmax(likeness(keys))


def expected_attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, future: int, theta: float
) -> np.ndarray:
    """Queries [W, H, D] before rotation; the covariance as a D x D matrix, turned by the mean rotation."""
    (_, heads, dim), (length, kv_heads, _) = queries.shape, keys.shape
    basis = np.broadcast_to(np.eye(dim)[:, None], (dim, 1, dim))
    turned = [rotate(basis, np.full(dim, future + step), theta)[:, 0] for step in range(512)]
    mean_rotation = np.mean(turned, axis=0).T
    scores = np.zeros((kv_heads, length))
    for head in range(heads):
        its, key = queries[:, head], keys[:, head * kv_heads // heads]
        mean = mean_rotation @ its.mean(0)
        covariance = mean_rotation @ np.cov(its.T, bias=True) @ mean_rotation.T
        logits = key @ mean / np.sqrt(dim) + np.einsum("nd,de,ne->n", key, covariance, key) / (2 * dim)
        scores[head * kv_heads // heads] += softmax(logits) / (heads // kv_heads)
    return scores * np.linalg.norm(values, axis=-1).T


def best(scores: np.ndarray, kept: int, sink: int, recent: int) -> np.ndarray:
    """The tokens [K, kept] that stay, ascending; of equal scores the earlier."""
    length = scores.shape[1]
    ranked = scores.copy()
    ranked[:, :sink] = ranked[:, max(length - recent, 0) :] = np.inf
    order = np.argsort(-ranked, axis=1, kind="stable")[:, :kept]
    return np.sort(order, axis=1)
