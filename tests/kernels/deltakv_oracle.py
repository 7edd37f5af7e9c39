"""DeltaKV token by token in NumPy, float64: independent of every implementation it judges."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from pallas_kernels.deltakv import Grid


def bf16(values) -> np.ndarray:
    """Rounded as scales are stored."""
    return np.asarray(values).astype(ml_dtypes.bfloat16).astype(np.float64)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def compress(weights: dict, x: np.ndarray) -> np.ndarray:
    """f of one token x [A, W]."""
    out = []
    for a, part in enumerate(x):
        gate, up = weights["gate_up"][a, 0] @ part, weights["gate_up"][a, 1] @ part
        out.append(weights["skip"][a] @ part + weights["down"][a] @ (silu(gate) * up))
    return np.stack(out)


def center(x: np.ndarray, grid: Grid, head_dim: int) -> np.ndarray:
    """One center [A, W] as it is read back."""
    if grid.centers == "none":
        return x
    parts = x.reshape(-1, head_dim)
    scale = bf16(np.abs(parts).max(1) / 127)[:, None]
    return (np.clip(code_of(parts / np.where(scale > 0, scale, 1)), -127, 127) * scale).reshape(x.shape)


def code_of(ratio: np.ndarray) -> np.ndarray:
    """Codes of what lies at `ratio`, which rounds up a little early."""
    return np.rint(ratio + 2.0**-10)


def rounded(z: np.ndarray, grid: Grid) -> np.ndarray:
    """Latents [O, A, C] of a page as they are read back."""
    if grid.latents == "none":
        return z
    if grid.latents == "int8":
        scale = bf16(np.abs(z).max(0) / 127)
        return np.clip(code_of(z / np.where(scale > 0, scale, 1)), -127, 127) * scale
    low, high = z.min(0), z.max(0)
    scale, zero = bf16((high - low) / 15), bf16(low)
    return np.clip(code_of((z - zero) / np.where(scale > 0, scale, 1)), 0, 15) * scale + zero


def page_references(x: np.ndarray, grid: Grid, centers: list[np.ndarray], number: int) -> list[int]:
    """Ordinals that page `number` refers to: greedy coverage over its own centers and the shortlist of earlier ones."""
    own = list(range(number * grid.own, (number + 1) * grid.own))
    nearest = [min(((centers[o] - centers[e]) ** 2).sum() for o in own) for e in range(own[0])]
    earlier = sorted(range(own[0]), key=lambda e: nearest[e])[: grid.shortlist]
    tokens = [t for t in range(number * grid.page_size, (number + 1) * grid.page_size) if t % grid.stride]

    def distance(t: int, c: int) -> float:
        return ((x[t] - centers[c]) ** 2).sum() if c * grid.stride <= t else np.inf

    chosen = [own[0]]
    while len(chosen) < grid.references:
        best = {c: 0.0 for c in own + earlier}
        for t in tokens:
            now = min(distance(t, c) for c in chosen)
            for c in best:
                best[c] += max(0.0, now - distance(t, c))
        top = max(best, key=best.get)
        chosen.append(top if best[top] > 0 else own[0])
    return chosen


def read(weights: dict, grid: Grid, x: np.ndarray, head_dim: int) -> tuple[np.ndarray, list[list[int]]]:
    """Every whole page of x [n, A, W] as it is read back, and each page's references."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = np.asarray(x, np.float64)
    centers = [center(token, grid, head_dim) for token in x[:: grid.stride]]
    out, references = x.copy(), []
    for number in range(len(x) // grid.page_size):
        chosen = page_references(x, grid, centers, number)
        references.append(chosen)
        tokens, bases = [], []
        for t in range(number * grid.page_size, (number + 1) * grid.page_size):
            if t % grid.stride == 0:
                out[t] = centers[t // grid.stride]
                continue
            seen = [c for c in chosen if c * grid.stride <= t]
            near = sorted(seen, key=lambda c: ((x[t] - centers[c]) ** 2).sum())[: grid.neighbours]
            near += near[:1] * (grid.neighbours - len(near))
            tokens.append(t)
            bases.append(np.mean([centers[c] for c in near], axis=0))
        z = np.stack([compress(weights, x[t]) - compress(weights, b) for t, b in zip(tokens, bases, strict=True)])
        for t, b, latent in zip(tokens, bases, rounded(z, grid), strict=True):
            out[t] = b + np.einsum("awc,ac->aw", weights["g"], latent)
    return out, references
