"""Sequences and random compressors for tests of DeltaKV."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import deltakv_encode
from pallas_kernels.deltakv import Grid, vectors
from pallas_kernels.deltakv_pools import DeltaPools, empty


@dataclasses.dataclass(frozen=True)
class Sizes:
    """KV heads, query heads of each, head dim, and latent width of a head group, and whose pools."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 8
    latent: int = 6
    platform: str = "cpu"


KV_HEADS, HEAD_DIM = Sizes.kv_heads, Sizes.head_dim


def compressor(groups: int, sizes: Sizes = Sizes(), seed: int = 0, inner: int = 5) -> dict[str, np.ndarray]:
    """Random weights of moderate size."""
    rng, width, latent = np.random.default_rng(seed), 2 * sizes.kv_heads * sizes.head_dim // groups, sizes.latent
    shapes = {"skip": (latent, width), "gate_up": (2, inner, width), "down": (latent, inner), "g": (width, latent)}
    return {
        name: (rng.standard_normal((groups, *shape)) * shape[-1] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def frequencies(head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions."""
    return np.asarray(10000.0 ** (-np.arange(0, head_dim, 2) / head_dim), np.float32)


def rotate(x: np.ndarray, position: int) -> np.ndarray:
    """x [.., D] at a position, in float64."""
    half = x.shape[-1] // 2
    angles = position * frequencies(x.shape[-1]).astype(np.float64)
    turned = np.exp(1j * angles) * (x[..., :half] + 1j * x[..., half:])
    return np.concatenate([turned.real, turned.imag], axis=-1)


def tokens(count: int, seed: int = 1, sizes: Sizes = Sizes()) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [count, K, D] that resemble earlier ones, as those of a text do."""
    rng, of_token = np.random.default_rng(seed), (2, sizes.kv_heads, sizes.head_dim)
    themes = rng.standard_normal((5, *of_token))
    both = themes[rng.integers(0, 5, count)] + 0.2 * rng.standard_normal((count, *of_token))
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


def build(
    grid: Grid, lengths: tuple[int, ...], groups: int, seed: int = 2, sizes: Sizes = Sizes()
) -> Sealed:
    """Sequences of whole pages on scattered physical pages; pages of no sequence hold NaN, and so do free centers."""
    held = [length // grid.page_size for length in lengths]
    order = np.random.default_rng(seed).permutation(np.arange(1, sum(held) + 2))
    shape = (sum(held) + 2, sizes.kv_heads, grid.page_size, sizes.head_dim)
    k_pages, v_pages = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    tables = np.full((len(lengths), max(held) + 1), shape[0] - 1, np.int32)
    pages, x, taken = [], [], 0
    for row, count in enumerate(held):
        k, v = tokens(count * grid.page_size, seed + row, sizes)
        x.append(np.asarray(vectors(jnp.asarray(k), jnp.asarray(v), groups)))
        for logical in range(count):
            physical = int(order[taken])
            taken += 1
            span = slice(logical * grid.page_size, (logical + 1) * grid.page_size)
            k_pages[physical], v_pages[physical] = k[span].swapaxes(0, 1), v[span].swapaxes(0, 1)
            tables[row, logical] = physical
            pages.append((row, logical, physical))
    extents = (shape[0], sizes.kv_heads, sizes.head_dim, groups, sizes.latent, jnp.float32, sizes.platform)
    pools = empty(grid, *extents)
    if pools.center_scales is not None:
        pools = pools._replace(center_scales=jnp.full_like(pools.center_scales, jnp.nan).at[0].set(0))
    return Sealed(k_pages, v_pages, pages, tables, x, pools)


def sealed(case: Sealed, weights: dict[str, np.ndarray], grid: Grid) -> DeltaPools:
    """The pools of a case with all its pages."""
    lists = case.moves(list(range(len(case.pages))))
    dense = (case.k_pages, case.v_pages, lists["page_ids"], lists["targets"], case.tables)
    call = jax.jit(deltakv_encode, static_argnames=("grid", "implementation"))
    return call(
        case.pools, weights, *dense, lists["rows"], lists["logical"], grid=grid, implementation="xla"
    )
