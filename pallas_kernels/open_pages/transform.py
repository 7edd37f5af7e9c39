"""From coded pages to dense ones, both as their pools store them."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels import codes, layouts, moves


def decoder(k_pages: Array, v_pages: Array | None, head_dim: int) -> moves.Transform:
    """The function of coded pages (k, v or None, scales) that gives pages for these dense pools."""
    pools = 1 if v_pages is None else 2

    def decode(k_codes: Array, v_codes: Array | None, scales: Array) -> moves.Pools:
        k, v = codes.decode_pages(k_codes, v_codes, scales, head_dim)
        return layouts.pack(k.astype(k_pages.dtype), v.astype(k_pages.dtype), k_pages.shape[-1], pools)

    return decode
