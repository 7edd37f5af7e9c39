"""Coded pools of a case, made in NumPy: dead pages and dead tokens have NaN scales and codes without meaning."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from . import sparse_oracle
from .cases import DTYPES, Case, Spec, build

CODE_DTYPES = {"int8": np.dtype(np.int8), "fp8": np.dtype(jnp.float8_e4m3fn), "int4": np.dtype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class CodedSpec(Spec):
    """A case whose pools are coded."""

    codec: str = "int8"
    scale_dtype: str = "f32"
    side_by_side: bool = False  # K and V in one pool, padded to 128 lanes
    scales_padding: int = 0


@dataclasses.dataclass
class Coded:
    """Coded pools as the ops take them, and the float64 keys and values that they stand for."""

    k_codes: np.ndarray
    v_codes: np.ndarray | None
    scales: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def build_coded(spec: CodedSpec) -> tuple[Case, Coded]:
    """The case of `spec` with dense pools, and the coded pools made of these."""
    case = build(spec)
    return case, encode(case, spec)


def encode(case: Case, spec: CodedSpec) -> Coded:
    """Codes the pools of a case; where they hold NaN, tokens are dead."""
    rng = np.random.default_rng(3)
    dead = np.isnan(case.k_pages.astype(np.float32)).all(-1)  # [N, K, P]
    empty = dead.all(-1)
    dtype = np.dtype(DTYPES[spec.scale_dtype])
    stored, sides, decoded = [], [], []
    for pool, axis in ((case.k_pages, -2), (case.v_pages, -1)):
        live = np.where(dead[..., None], 0, pool.astype(np.float64))
        scale, zero = sparse_oracle.scale_of(live, spec.codec, axis, dtype)
        ratio = sparse_oracle.ratios(live, spec.codec, axis, scale, zero)
        codes = (np.rint(ratio) if spec.codec != "fp8" else ratio).astype(CODE_DTYPES[spec.codec])
        noise = rng.integers(0, 16 if spec.codec == "int4" else 128, codes.shape).astype(np.uint8)
        codes = np.where(dead[..., None], noise.view(codes.dtype), codes)
        values = np.where(dead[..., None], 0, codes.astype(np.float64))
        values = values * np.expand_dims(scale.astype(np.float64), axis)
        poison = empty[..., None] if axis == -2 else dead
        for side in (scale, zero):
            if side is not None:
                sides.append(np.where(poison, dtype.type(np.nan), side))
        if zero is not None:
            values = values + np.expand_dims(zero.astype(np.float64), axis)
        stored.append(pack(codes) if spec.codec == "int4" else codes)
        decoded.append(values)
    scales = np.concatenate(sides, axis=-1)
    if spec.scales_padding:
        scales = np.pad(scales, ((0, 0), (0, 0), (0, spec.scales_padding)), constant_values=np.nan)
    k_codes, v_codes = stored
    if spec.side_by_side:
        together = np.concatenate(stored, axis=-1)
        k_codes, v_codes = np.pad(together, ((0, 0),) * 3 + ((0, 128 - together.shape[-1]),)), None
    return Coded(k_codes, v_codes, scales, *decoded)


def pack(codes: np.ndarray) -> np.ndarray:
    """Two tokens in a byte: r in the low bits of row r, P / 2 + r in the high ones."""
    half = codes.shape[-2] // 2
    return codes[..., :half, :] + 16 * codes[..., half:, :]
