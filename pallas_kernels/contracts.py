"""Checks of arrays that not only dense attention takes: keys alone, bounds, coded pools, lists of pages."""

from __future__ import annotations

from typing import Any

from pallas_kernels import checks, codes
from pallas_kernels.layouts import LANES

GROUP_REDUCTIONS = ("max", "mean", "sum")


def group_reduction(group: str) -> None:
    """Requires a known way to reduce the query heads of a KV head to one number."""
    allowed = ", ".join(GROUP_REDUCTIONS)
    checks.require(group in GROUP_REDUCTIONS, f"group must be one of {allowed}; got {group!r}")


def stores(name: str, pool: Any, values: int) -> None:
    """Requires a minor dimension of so many values, or padded to a multiple of the lanes of a tile."""
    minor = pool.shape[-1]
    checks.require(
        minor == values or (minor > values and minor % LANES == 0),
        f"{name} must store {values} values, or be padded to a multiple of {LANES}; got {list(pool.shape)}",
    )


def key_pages(k_pages: Any, scales: Any, head_dim: int) -> tuple[int, int, int]:
    """Checks dense keys, or coded ones where there are scales; returns (N, K, P)."""
    checks.shape_of("k_pages", k_pages, (None,) * 4, "N K P D")
    stores("k_pages", k_pages, head_dim)
    pages, kv_heads, page_size, _ = k_pages.shape
    if scales is None:
        checks.floating("k_pages", k_pages)
        return pages, kv_heads, page_size
    return pages, kv_heads, _scales(k_pages, scales, head_dim)


def coded_pools(k_codes: Any, v_codes: Any, scales: Any, head_dim: int) -> tuple[int, int, int, int]:
    """Checks one layer's coded pools; returns (N, K, P, D)."""
    checks.shape_of("k_codes", k_codes, (None,) * 4, "N K P D")
    stores("k_codes", k_codes, head_dim if v_codes is not None else 2 * head_dim)
    if v_codes is not None:
        checks.shape_of("v_codes", v_codes, tuple(k_codes.shape), "N K P D")
        same = f"k_codes and v_codes must share a dtype; got {k_codes.dtype} and {v_codes.dtype}"
        checks.require(k_codes.dtype == v_codes.dtype, same)
    return k_codes.shape[0], k_codes.shape[1], _scales(k_codes, scales, head_dim), head_dim


def transfer(k_codes: Any, v_codes: Any, scales: Any, k_pages: Any, v_pages: Any, head_dim: int) -> None:
    """Checks coded and dense pools between which pages move."""
    coded = coded_pools(k_codes, v_codes, scales, head_dim)
    dense = checks.pools(k_pages, v_pages, head_dim)
    checks.require(
        coded[1:] == dense[1:],
        f"coded and dense pools must agree in K, P and D; got {list(coded[1:])} and {list(dense[1:])}",
    )


def bounds_pool(bounds: Any, head_dim: int) -> int:
    """Checks a pool of bounds of keys with this head dim; returns K."""
    checks.shape_of("bounds", bounds, (None,) * 3, "N K X")
    checks.floating("bounds", bounds)
    half, odd = divmod(bounds.shape[2], 2)
    checks.require(
        not odd and half >= head_dim,
        f"bounds must store {head_dim} minima and as many maxima; got {list(bounds.shape)}",
    )
    return bounds.shape[1]


def _scales(k_codes: Any, scales: Any, head_dim: int) -> int:
    """Checks the scales of a coded pool; returns P."""
    codec, page_size = codes.codec_of(k_codes), codes.page_size(k_codes)
    checks.shape_of("scales", scales, (*k_codes.shape[:2], None), "N K X")
    checks.floating("scales", scales)
    stores("scales", scales, codes.scales_width(codec, page_size, head_dim))
    return page_size


def page_moves(page_ids: Any, targets: Any, count: Any) -> None:
    """Checks lists of source and target pages and the number of those that count."""
    checks.shape_of("page_ids", page_ids, (None,), "S")
    checks.int32("page_ids", page_ids)
    checks.shape_of("targets", targets, tuple(page_ids.shape), "S")
    checks.int32("targets", targets)
    if count is not None:
        checks.shape_of("count", count, (), "")
        checks.int32("count", count)


def listed(rows: int, kv_heads: int, page_ids: Any, counts: Any) -> None:
    """Checks page lists [B, Kl, S] of so many rows and their counts [B, Kl]."""
    checks.shape_of("page_ids", page_ids, (rows, None, None), "B Kl S")
    checks.page_lists(page_ids, counts, counts[:, 0], None, kv_heads)
