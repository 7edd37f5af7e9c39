"""Inputs of paged attention with everything that must not be read set to NaN, or to ids that do not exist."""

from __future__ import annotations

import dataclasses
import zlib

import jax.numpy as jnp
import numpy as np

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a case looks like. `lengths` are tokens per row, `queries` the tokens of each row's chunk
    (prefill)."""

    name: str
    lengths: tuple[int, ...]
    queries: tuple[int, ...] | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "f32"
    head_lists: bool = False  # one list per KV head
    gaps: bool = False  # lists leave out pages, with logical ids
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    spare_tokens: int = 0  # tokens at the end of the chunk that no row owns

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass
class Case:
    """NumPy arrays of one case, under the names of the ops' arguments."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    page_ids: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    query_starts: np.ndarray | None
    logical_ids: np.ndarray | None
    sinks: np.ndarray | None
    window: int | None
    soft_cap: float | None
    scale: float | None

    def options(self) -> dict:
        """Keyword arguments of the ops: arrays first, static values as they are."""
        return {
            "logical_ids": self.logical_ids,
            "sinks": self.sinks,
            "window": self.window,
            "soft_cap": self.soft_cap,
            "scale": self.scale,
        }


def build(spec: Spec) -> Case:
    """Random inputs of `spec`, the same on every run."""
    rng = np.random.default_rng(zlib.crc32(spec.name.encode()))
    rows, size, dtype = len(spec.lengths), spec.page_size, DTYPES[spec.dtype]
    held = [-(-length // size) for length in spec.lengths]
    width = max(held) + 2
    total = sum(held)
    physical = rng.permutation(np.arange(1, total + 3))  # page 0 and two more stay dead
    pool_shape = (total + 3, spec.kv_heads, size, spec.head_dim)
    k_pages, v_pages = np.full(pool_shape, np.nan, np.float32), np.full(pool_shape, np.nan, np.float32)
    lists = spec.kv_heads if spec.head_lists else 1
    # Past the counts: ids that do not exist, far above and below.
    page_ids = rng.choice([10**8, -7, total + 3], (rows, lists, width)).astype(np.int32)
    logical_ids = rng.choice([-3, 0, 10**6], (rows, lists, width)).astype(np.int32)
    counts = np.zeros((rows, lists), np.int32)
    first = 0
    for row, (length, pages) in enumerate(zip(spec.lengths, held, strict=True)):
        own = physical[first : first + pages]
        first += pages
        for page, start in zip(own, range(0, length, size), strict=True):
            live = (page, slice(None), slice(0, min(size, length - start)))
            k_pages[live] = rng.standard_normal(k_pages[live].shape)
            v_pages[live] = rng.standard_normal(v_pages[live].shape)
        for which in range(lists):
            chosen = np.arange(pages)
            if spec.gaps and pages > 1:
                others = rng.permutation(pages - 1)[: rng.integers(0, pages)]
                chosen = np.sort(np.append(others, pages - 1))
            elif spec.head_lists:
                chosen = chosen[: rng.integers(1, pages + 1)] if pages else chosen
            counts[row, which] = len(chosen)
            page_ids[row, which, : len(chosen)] = own[chosen]
            logical_ids[row, which, : len(chosen)] = chosen
    starts = None if spec.queries is None else np.concatenate([[0], np.cumsum(spec.queries)]).astype(np.int32)
    tokens = rows if starts is None else int(starts[-1]) + spec.spare_tokens
    return Case(
        q=rng.standard_normal((tokens, spec.heads, spec.head_dim)).astype(dtype),
        k_pages=k_pages.astype(dtype),
        v_pages=v_pages.astype(dtype),
        page_ids=page_ids,
        counts=counts,
        lengths=np.asarray(spec.lengths, np.int32),
        query_starts=starts,
        logical_ids=logical_ids if spec.gaps else None,
        sinks=rng.standard_normal(spec.heads).astype(np.float32) if spec.sinks else None,
        window=spec.window,
        soft_cap=spec.soft_cap,
        scale=spec.scale,
    )
