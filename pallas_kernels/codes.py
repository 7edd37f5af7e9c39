"""How coded pages store keys and values: the codecs, their scales, and the packing of int4.

A coded pool holds codes of one of three dtypes, which name the codec:

* int8 [N, K, P, D] and float8_e4m3fn [N, K, P, D]: value = scale * code;
* uint8 [N, K, P / 2, D], int4: value = zero + scale * code with codes 0 to 15, two tokens in a byte. Row r
  holds token r in its low four bits and token P / 2 + r in its high ones, so that either half unpacks into
  consecutive tokens.

XLA on CPU has no copies of 8-bit floats: it would convert whole pools of fp8 to other floats and back around every
gather and scatter. There pages move as bytes (`as_bytes`, `from_bytes`). The views cost nothing where pools also
lie as bytes outside the call.

Keys have one scale (and zero) per channel of a page, values one per token (KIVI, arXiv 2402.02750, with the
page as the group). All of a page's scales of one KV head lie together in one pool [N, K, X] of a floating
dtype:

    k_scale [D] | k_zero [D] (int4 only) | v_scale [P] | v_zero [P] (int4 only) | padding
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.layouts import views

LEVELS = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}  # the largest code
NUDGE = 2.0**-10
"""Part of a code by which rounding goes up early. Values that were coded before lie exactly between two codes of
another group again and again, and there the last bits, in which programs differ, would decide."""
_CODECS = {jnp.dtype(jnp.int8): "int8", jnp.dtype(jnp.float8_e4m3fn): "fp8", jnp.dtype(jnp.uint8): "int4"}
DTYPES = {codec: dtype for dtype, codec in _CODECS.items()}


def as_bytes(pool: Array) -> Array:
    """fp8 codes as uint8 on a CPU, anything else as it is."""
    if pool.dtype != DTYPES["fp8"] or jax.default_backend() != "cpu":
        return pool
    return lax.bitcast_convert_type(pool, jnp.uint8)


def from_bytes(pages: Array, dtype: Any) -> Array:
    """Pages out of a pool of `dtype` that moved as bytes."""
    return pages if pages.dtype == dtype else lax.bitcast_convert_type(pages, dtype)


def codec_of(codes: Any) -> str:
    """"int8", "fp8" or "int4", by the dtype of the codes; TypeError for other dtypes."""
    codec = _CODECS.get(jnp.dtype(codes.dtype))
    if codec is None:
        known = ", ".join(str(dtype) for dtype in _CODECS)
        raise TypeError(f"codes must have one of the dtypes {known}; got {codes.dtype}")
    return codec


def page_size(codes: Any) -> int:
    """Tokens of a page [.., P or P / 2, D] of codes."""
    return codes.shape[-2] * (2 if codec_of(codes) == "int4" else 1)


def scales_width(codec: str, page_size: int, head_dim: int) -> int:
    """X without padding: numbers that a page of one KV head needs beside its codes."""
    return (head_dim + page_size) * (2 if codec == "int4" else 1)


@dataclasses.dataclass(frozen=True)
class Scales:
    """The parts of scales [.., X]: k_scale, k_zero [.., D], v_scale, v_zero [.., P]; zeros in int4 only."""

    k_scale: Array
    k_zero: Array | None
    v_scale: Array
    v_zero: Array | None

    @classmethod
    def of(cls, scales: Array, codec: str, page_size: int, head_dim: int) -> Scales:
        """Views of the parts, in the dtype they are stored in."""
        widths = (head_dim, head_dim, page_size, page_size) if codec == "int4" else (head_dim, page_size)
        parts, first = [], 0
        for width in widths:
            parts.append(scales[..., first : first + width])
            first += width
        return cls(*parts) if codec == "int4" else cls(parts[0], None, parts[1], None)

    def joined(self, width: int) -> Array:
        """The parts side by side, padded with zeros to `width`."""
        parts = [part for part in (self.k_scale, self.k_zero, self.v_scale, self.v_zero) if part is not None]
        together = jnp.concatenate(parts, axis=-1)
        padding = ((0, 0),) * (together.ndim - 1) + ((0, width - together.shape[-1]),)
        return jnp.pad(together, padding)


def pack(codes: Array) -> Array:
    """Codes 0 to 15 [.., P, D] as bytes [.., P / 2, D]."""
    low, high = jnp.split(codes.astype(jnp.uint8), 2, axis=-2)
    return low | (high << 4)


def unpack(packed: Array) -> Array:
    """Bytes [.., P / 2, D] as codes 0 to 15 [.., P, D], uint8."""
    return jnp.concatenate([packed & 15, packed >> 4], axis=-2)


def numbers(codes: Array, codec: str) -> Array:
    """Codes [.., P, D] in float32, unpacked: what scales multiply."""
    return (unpack(codes) if codec == "int4" else codes).astype(jnp.float32)


def encode(values: Array, codec: str, axis: int, scale_dtype: Any) -> tuple[Array, Array, Array | None]:
    """Codes of values [.., P, D], not packed, with one scale per group along `axis` (-2 keys, -1 values).

    Returns (codes, scale, zero or None), scale and zero [.., D] or [.., P] in `scale_dtype`. Codes are those
    nearest to the values (but for `NUDGE`) under the scale and zero as stored, so that rounding these costs
    nothing twice.
    """
    values = values.astype(jnp.float32)
    if codec == "int4":
        low, high = values.min(axis), values.max(axis)
        span, zero = high - low, low.astype(scale_dtype)
        offset = values - jnp.expand_dims(zero.astype(jnp.float32), axis)
    else:
        span, zero, offset = jnp.abs(values).max(axis), None, values
    scale = (span / LEVELS[codec]).astype(scale_dtype)
    stored = scale.astype(jnp.float32)
    ratio = offset / jnp.expand_dims(jnp.where(stored > 0, stored, 1), axis)
    lowest = 0 if codec == "int4" else -LEVELS[codec]
    # Numbers of fp8 lie apart by an eighth of themselves or less.
    ratio = ratio * (1 + NUDGE / 8) if codec == "fp8" else jnp.round(ratio + NUDGE)
    return jnp.clip(ratio, lowest, LEVELS[codec]).astype(DTYPES[codec]), scale, zero


def decode(codes: Array, codec: str, axis: int, scale: Array, zero: Array | None) -> Array:
    """Values [.., P, D] in float32 of codes as stored, with one scale per group along `axis`."""
    values = numbers(codes, codec) * jnp.expand_dims(scale.astype(jnp.float32), axis)
    return values if zero is None else values + jnp.expand_dims(zero.astype(jnp.float32), axis)


def keys(k_pages: Array, scales: Array | None, head_dim: int) -> Array:
    """Keys [.., P, D] in float32 of pages [.., M] as stored, dense or coded with their scales [.., X]."""
    stored = k_pages[..., :head_dim]
    if scales is None:
        return stored.astype(jnp.float32)
    codec = codec_of(k_pages)
    parts = Scales.of(scales, codec, page_size(k_pages), head_dim)
    return decode(stored, codec, -2, parts.k_scale, parts.k_zero)


def decode_pages(
    k_codes: Array, v_codes: Array | None, scales: Array, head_dim: int
) -> tuple[Array, Array]:
    """Keys and values [.., P, D] in float32 of coded pages."""
    codec = codec_of(k_codes)
    parts = Scales.of(scales, codec, page_size(k_codes), head_dim)
    _, stored = views(k_codes, v_codes, head_dim)
    return keys(k_codes, scales, head_dim), decode(stored, codec, -1, parts.v_scale, parts.v_zero)


def encode_pages(k: Array, v: Array, codec: str, scale_dtype: Any) -> tuple[Array, Array, Scales]:
    """Codes as stored of keys and values [.., P, D], and their scales."""
    k_codes, k_scale, k_zero = encode(k, codec, -2, scale_dtype)
    v_codes, v_scale, v_zero = encode(v, codec, -1, scale_dtype)
    if codec == "int4":
        k_codes, v_codes = pack(k_codes), pack(v_codes)
    return k_codes, v_codes, Scales(k_scale, k_zero, v_scale, v_zero)
