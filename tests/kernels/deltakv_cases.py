"""Sequences and random compressors for tests of DeltaKV."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.deltakv import Grid, vectors
from pallas_kernels.deltakv_pools import DeltaPools, empty

KV_HEADS, HEAD_DIM, LATENT = 2, 8, 6


def compressor(groups: int, seed: int = 0, inner: int = 5) -> dict[str, np.ndarray]:
    """Random weights of moderate size."""
    rng, width = np.random.default_rng(seed), 2 * KV_HEADS * HEAD_DIM // groups
    shapes = {"skip": (LATENT, width), "gate_up": (2, inner, width), "down": (LATENT, inner), "g": (width, LATENT)}
    return {
        name: (rng.standard_normal((groups, *shape)) * shape[-1] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def tokens(count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [count, K, D] that resemble earlier ones, as those of a text do."""
    rng = np.random.default_rng(seed)
    themes = rng.standard_normal((5, 2, KV_HEADS, HEAD_DIM))
    both = themes[rng.integers(0, 5, count)] + 0.2 * rng.standard_normal((count, 2, KV_HEADS, HEAD_DIM))
    return both[:, 0].astype(np.float32), both[:, 1].astype(np.float32)


@dataclasses.dataclass
class Sealed:
    """Rows of sequences in dense pools and the arguments that seal all their pages."""

    k_pages: np.ndarray
    v_pages: np.ndarray
    pages: list[tuple[int, int, int]]  # row, logical, physical
    tables: np.ndarray
    x: list[np.ndarray]
    pools: DeltaPools

    def moves(self, which: list[int], width: int | None = None) -> dict[str, np.ndarray]:
        """Lists of pages to seal, padded with what does not exist to `width`."""
        rows, logical, physical = (list(column) for column in zip(*(self.pages[i] for i in which), strict=True))
        lists = {"page_ids": physical, "targets": physical, "rows": rows, "logical": logical}
        spare = (width or len(which)) - len(which)
        return {name: np.asarray([*values, *[10**6] * spare], np.int32) for name, values in lists.items()}


def build(grid: Grid, lengths: tuple[int, ...], groups: int, seed: int = 2) -> Sealed:
    """Sequences of whole pages on scattered physical pages; pages of no sequence hold NaN, and so do free centers."""
    held = [length // grid.page_size for length in lengths]
    order = np.random.default_rng(seed).permutation(np.arange(1, sum(held) + 2))
    shape = (sum(held) + 2, KV_HEADS, grid.page_size, HEAD_DIM)
    k_pages, v_pages = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    tables = np.full((len(lengths), max(held) + 1), shape[0] - 1, np.int32)
    pages, x, taken = [], [], 0
    for row, count in enumerate(held):
        k, v = tokens(count * grid.page_size, seed + row)
        x.append(np.asarray(vectors(jnp.asarray(k), jnp.asarray(v), groups)))
        for logical in range(count):
            physical = int(order[taken])
            taken += 1
            span = slice(logical * grid.page_size, (logical + 1) * grid.page_size)
            k_pages[physical], v_pages[physical] = k[span].swapaxes(0, 1), v[span].swapaxes(0, 1)
            tables[row, logical] = physical
            pages.append((row, logical, physical))
    pools = empty(grid, shape[0], KV_HEADS, HEAD_DIM, groups, LATENT, jnp.float32)
    if pools.center_scales is not None:
        pools = pools._replace(center_scales=jnp.full_like(pools.center_scales, jnp.nan).at[0].set(0))
    return Sealed(k_pages, v_pages, pages, tables, x, pools)
