"""Random paged inputs: small ones on the host whose spare pages hold NaN, large ones made on the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


@dataclasses.dataclass
class Case:
    """One call of an attention op. Rows own queries starts[b] : starts[b + 1]."""

    q: np.ndarray
    k_pages: np.ndarray
    v_pages: np.ndarray
    page_ids: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    logical_ids: np.ndarray | None
    sinks: np.ndarray | None
    window: int | None
    soft_cap: float | None
    own_page: bool = True  # else queries see only the pages before that of their position

    @property
    def kv_heads(self) -> int:
        return self.k_pages.shape[1]

    @property
    def page(self) -> int:
        return self.k_pages.shape[2]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def keys(self, ids: np.ndarray, kv_head: int) -> np.ndarray:
        """Keys [S, P, D] of pages, float64."""
        return self.k_pages[ids, kv_head].astype(np.float64)

    def values(self, ids: np.ndarray, kv_head: int) -> np.ndarray:
        """Values [S, P, D] of pages, float64."""
        return self.v_pages[ids, kv_head].astype(np.float64)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The positional arguments that decode and prefill attention share."""
        return self.q, self.k_pages, self.v_pages, self.page_ids, self.counts, self.lengths

    def options(self) -> dict[str, Any]:
        return {
            "logical_ids": self.logical_ids,
            "sinks": self.sinks,
            "window": self.window,
            "soft_cap": self.soft_cap,
        }


def draw(
    rng: np.random.Generator,
    lengths: tuple[int, ...],
    queries: tuple[int, ...] | None = None,
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 128,
    page: int = 32,
    dtype: str = "bf16",
    head_lists: bool = False,
    gaps: bool = False,
    sinks: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Case:
    """Fresh inputs. Spare pages and the slots past a row's end hold NaN, ids past the counts do not exist."""
    held = [-(-length // page) for length in lengths]
    total, width = sum(held), max(held) + 2
    shape = (total + 4, kv_heads, page, head_dim)
    pools = [np.full(shape, np.nan, np.float32) for _ in range(2)]
    physical = iter(rng.permutation(np.arange(1, total + 4)))
    lists = kv_heads if head_lists else 1
    page_ids = rng.choice([10**8, -7, total + 4], (len(lengths), lists, width)).astype(np.int32)
    logical_ids = rng.choice([-3, 0, 10**6], page_ids.shape).astype(np.int32)
    counts = np.zeros((len(lengths), lists), np.int32)
    for row, (length, count) in enumerate(zip(lengths, held, strict=True)):
        own = np.array([next(physical) for _ in range(count)], np.int32)
        for index, one in enumerate(own):
            live = (one, slice(None), slice(0, min(page, length - index * page)))
            for pool in pools:
                pool[live] = rng.standard_normal(pool[live].shape, np.float32)
        for which in range(lists):
            chosen = np.arange(count)
            if gaps and count > 1:
                some = rng.permutation(count - 1)[: rng.integers(0, count)]
                chosen = np.sort(np.append(some, count - 1))
            counts[row, which] = len(chosen)
            page_ids[row, which, : len(chosen)] = own[chosen]
            logical_ids[row, which, : len(chosen)] = chosen
    starts = np.concatenate([[0], np.cumsum(queries or [1] * len(lengths))]).astype(np.int32)
    kind = DTYPES[dtype]
    return Case(
        q=rng.standard_normal((starts[-1], heads, head_dim), np.float32).astype(kind),
        k_pages=pools[0].astype(kind),
        v_pages=pools[1].astype(kind),
        page_ids=page_ids,
        counts=counts,
        lengths=np.asarray(lengths, np.int32),
        starts=starts,
        logical_ids=logical_ids if gaps else None,
        sinks=rng.standard_normal(heads, np.float32) if sinks else None,
        window=window,
        soft_cap=soft_cap,
    )


def normal(key: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Standard normal numbers made on the device."""
    return jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(key), shape, dtype)
