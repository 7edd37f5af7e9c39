"""From dense pages to coded ones, both as their pools store them."""

from __future__ import annotations

from jaxtyping import Array

from pallas_kernels import codes, layouts, moves


def encoder(k_codes: Array, v_codes: Array | None, scales: Array, head_dim: int) -> moves.Transform:
    """The function of dense pages (k, v or None) that gives pages for these coded pools."""
    pools = 1 if v_codes is None else 2

    def encode(k_pages: Array, v_pages: Array | None) -> moves.Pools:
        k, v = layouts.views(k_pages, v_pages, head_dim)
        k, v, parts = codes.encode_pages(k, v, codes.codec_of(k_codes), scales.dtype)
        return *layouts.pack(k, v, k_codes.shape[-1], pools), parts.joined(scales.shape[-1])

    return encode
