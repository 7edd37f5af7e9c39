"""Checks of arguments that the ops share. They run while tracing, on shapes and dtypes only."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.layouts import LANES


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def shape_of(name: str, array: Any, expected: tuple[int | None, ...], letters: str) -> None:
    """Requires `array` to have this shape; None in `expected` accepts any extent."""
    matches = len(array.shape) == len(expected) and all(
        e is None or e == s for s, e in zip(array.shape, expected, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape [{letters}] = [{wanted}]; got {list(array.shape)}")


def floating(name: str, array: Any) -> None:
    """Requires a floating dtype."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype; got {array.dtype}")


def int32(name: str, array: Any) -> None:
    """Requires dtype int32."""
    if array.dtype != jnp.int32:
        raise TypeError(f"{name} must be int32; got {array.dtype}")


def pools(k_pages: Any, v_pages: Any, head_dim: int) -> tuple[int, int, int, int]:
    """Checks one layer's pools against the shapes of `pallas_kernels.layouts`; returns (N, K, P, D)."""
    shape_of("k_pages", k_pages, (None,) * 4, "N K P D")
    floating("k_pages", k_pages)
    *extents, lanes = k_pages.shape
    if v_pages is None:
        require(
            lanes >= 2 * head_dim,
            f"one pool for K and V of head dim {head_dim} must store {2 * head_dim} values; got {lanes}",
        )
    else:
        shape_of("v_pages", v_pages, tuple(k_pages.shape), "N K P D")
        require(
            lanes == head_dim or (lanes > head_dim and lanes % LANES == 0),
            f"pools of head dim {head_dim} must store {head_dim} values, or be padded to a multiple of"
            f" {LANES}; got {lanes}",
        )
        require(
            k_pages.dtype == v_pages.dtype,
            f"k_pages and v_pages must share a dtype; got {k_pages.dtype} and {v_pages.dtype}",
        )
    return (*extents, head_dim)


def page_lists(page_ids: Any, counts: Any, lengths: Any, logical_ids: Any, kv_heads: int) -> None:
    """Checks page lists [B, Kl, J], their counts [B, Kl] and the lengths [B] of the rows."""
    shape_of("page_ids", page_ids, (None,) * 3, "B Kl J")
    rows, heads, _ = page_ids.shape
    require(
        heads in (1, kv_heads),
        f"page_ids must have one list per row or one per KV head (Kl = 1 or {kv_heads}); got Kl = {heads}",
    )
    shape_of("counts", counts, (rows, heads), "B Kl")
    shape_of("lengths", lengths, (rows,), "B")
    for name, array in (("page_ids", page_ids), ("counts", counts), ("lengths", lengths)):
        int32(name, array)
    if logical_ids is not None:
        shape_of("logical_ids", logical_ids, tuple(page_ids.shape), "B Kl J")
        int32("logical_ids", logical_ids)


def attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_ids: Any,
    counts: Any,
    lengths: Any,
    logical_ids: Any,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    sinks: Any,
) -> float:
    """Checks what decode and prefill attention have in common; returns the scale to use."""
    shape_of("q", q, (None, None, None), "B or T, H, D")
    _, kv_heads, _, head_dim = pools(k_pages, v_pages, q.shape[2])
    floating("q", q)
    queries(q, kv_heads, page_ids, counts, lengths, logical_ids, window, soft_cap)
    head_sinks(sinks, q.shape[1])
    return head_dim**-0.5 if scale is None else scale


def grouped(heads: int, kv_heads: int) -> None:
    """Requires the same number of query heads for each KV head."""
    require(
        heads % kv_heads == 0,
        f"query heads must be a multiple of the KV heads; got H = {heads} and K = {kv_heads}",
    )


def head_sinks(sinks: Any, heads: int) -> None:
    """Checks the logits [H] that join the softmax denominator, where there are any."""
    if sinks is not None:
        shape_of("sinks", sinks, (heads,), "H")
        floating("sinks", sinks)


def queries(
    q: Any,
    kv_heads: int,
    page_ids: Any,
    counts: Any,
    lengths: Any,
    logical_ids: Any,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Checks the page lists and the options that decide what queries [.., H, D] see."""
    grouped(q.shape[-2], kv_heads)
    page_lists(page_ids, counts, lengths, logical_ids, kv_heads)
    require(window is None or window >= 1, f"window must be None or at least 1 token; got {window}")
    require(soft_cap is None or soft_cap > 0, f"soft_cap must be None or positive; got {soft_cap}")
