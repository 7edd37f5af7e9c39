"""The sampler in NumPy float64, one row at a time, written for clarity: what the device must agree with."""

from __future__ import annotations

import numpy as np

from sparsejax.engine.params import SamplingParams


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def edited(logits, params: SamplingParams, prompt_ids, output_ids, stop_ids, never=(), banned=()) -> np.ndarray:
    """Logits after masks, bias, min_tokens and penalties."""
    x = logits.astype(np.float64).copy()
    if params.allowed_token_ids is not None:
        outside = np.ones(len(x), bool)
        outside[list(params.allowed_token_ids)] = False
        x[outside] = -np.inf
    for token in (*never, *banned):
        x[token] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    if len(output_ids) < params.min_tokens:
        x[list(stop_ids)] = -np.inf
    for token in set(prompt_ids) | set(output_ids):
        r = params.repetition_penalty
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token in output_ids:
        x[token] -= params.frequency_penalty
    for token in set(output_ids):
        x[token] -= params.presence_penalty
    return x if np.isfinite(x.max()) else logits.astype(np.float64)


def probabilities(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What each token is drawn with; ties at a threshold are kept."""
    x = x / params.temperature
    p = np.exp(x - x.max())
    p[p < params.min_p] = 0
    if 0 < params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0
    if params.top_p < 1:
        descending = np.sort(p)[::-1]
        reached = np.cumsum(descending) >= params.top_p * p.sum()
        p[p < descending[np.argmax(reached)]] = 0
    return p / p.sum()


def margin(x: np.ndarray, params: SamplingParams) -> float:
    """How far the row is from a different decision by rounding: smallest gap at the min_p and top_p edges."""
    x = x / params.temperature
    p = np.exp(x - x.max())
    gap = np.abs(p - params.min_p).min() if params.min_p else 1.0
    p[p < params.min_p] = 0
    if 0 < params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0
    if params.top_p < 1:
        share = np.cumsum(np.sort(p)[::-1]) / p.sum()
        gap = min(gap, np.abs(share - params.top_p).min())
    return float(gap)
