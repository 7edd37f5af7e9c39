"""Pages of codes for the cases: made of a dense case, and decoded in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import codes
from suite import paged


@dataclasses.dataclass
class Coded:
    """A dense case and the coded pools that stand for it; attention over it reads the codes."""

    case: paged.Case
    codec: str
    k_codes: np.ndarray
    v_codes: np.ndarray
    scales: np.ndarray

    def __getattr__(self, name: str):
        return getattr(self.case, name)

    def keys(self, ids: np.ndarray, kv_head: int) -> np.ndarray:
        """Keys [S, P, D] of pages, float64: scaled per channel."""
        scale, zero = self._sides(ids, kv_head, 0, self.case.q.shape[-1])
        values = self._codes(self.k_codes[ids, kv_head]) * scale[:, None]
        return values if zero is None else values + zero[:, None]

    def values(self, ids: np.ndarray, kv_head: int) -> np.ndarray:
        """Values [S, P, D] of pages, float64: scaled per token."""
        head_dim = self.case.q.shape[-1]
        scale, zero = self._sides(ids, kv_head, head_dim * (2 if self.codec == "int4" else 1), self.case.page)
        values = self._codes(self.v_codes[ids, kv_head]) * scale[..., None]
        return values if zero is None else values + zero[..., None]

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The positional arguments of `quantized_decode_attention`."""
        case = self.case
        return case.q, self.k_codes, self.v_codes, self.scales, case.page_ids, case.counts, case.lengths

    def _sides(self, ids, kv_head: int, at: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        sides = self.scales[ids, kv_head].astype(np.float64)
        zero = sides[..., at + width : at + 2 * width] if self.codec == "int4" else None
        return sides[..., at : at + width], zero

    def _codes(self, stored: np.ndarray) -> np.ndarray:
        if self.codec != "int4":
            return stored.astype(np.float64)
        return np.concatenate([stored & 15, stored >> 4], axis=-2).astype(np.float64)


def encode(case: paged.Case, codec: str) -> Coded:
    """Codes the pools of a case. Tokens that are not there get NaN for scales of their own."""
    dead = np.isnan(case.k_pages.astype(np.float32)).all(-1)  # [N, K, P]
    k, v = (np.where(dead[..., None], 0, pool.astype(np.float32)) for pool in (case.k_pages, case.v_pages))
    k_codes, v_codes, scales = codes.encode_pages(jnp.asarray(k), jnp.asarray(v), codec, jnp.bfloat16)
    nothing = dead.all(-1)[..., None]
    sides = {
        "k_scale": nothing,
        "k_zero": nothing,
        "v_scale": dead,
        "v_zero": dead,
    }
    for name, poison in sides.items():
        if getattr(scales, name) is not None:
            scales = dataclasses.replace(scales, **{name: jnp.where(poison, jnp.nan, getattr(scales, name))})
    joined = scales.joined(codes.scales_width(codec, case.page, case.q.shape[-1]))
    return Coded(case, codec, *(np.asarray(x) for x in (k_codes, v_codes, joined)))


def random_pools(
    codec: str, pages: int, kv_heads: int, page: int, head_dim: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random coded pools made on the device."""
    rows = page // 2 if codec == "int4" else page

    def draw(key: int) -> jax.Array:
        make = jax.jit(jax.random.bits, static_argnums=(1, 2))
        bits = make(jax.random.key(key), (pages, kv_heads, rows, head_dim), jnp.uint8)
        return jax.lax.bitcast_convert_type(bits, codes.DTYPES[codec])

    width = codes.scales_width(codec, page, head_dim)
    return draw(1), draw(2), paged.normal(3, (pages, kv_heads, width), jnp.bfloat16) * 0.01
