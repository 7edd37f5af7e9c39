"""Physical shape of dense pools on TPU.

XLA stores the two minor dimensions in tiles of 128 lanes, and a copy must move whole tiles: with a narrower
minor dimension XLA would re-lay the whole pool around every kernel call. So

* head dims that are multiples of 128 are stored as they are, [N, K, P, D];
* head dims up to 64 store K and V side by side in one pool [N, K, P, 128]: K in [..., :D], V in [..., D:2D];
* others are padded with zeros to the next multiple of 128 (80 and 96 to 128, 192 to 256).

Lanes past the stored values must be finite: pools start as zeros and writes pad with zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES = 128


def joint(head_dim: int) -> bool:
    """Whether K and V of this head dim share one pool."""
    return 2 * head_dim <= LANES


def lanes(head_dim: int) -> int:
    """Minor dimension of the pools that store this head dim."""
    return -(-head_dim // LANES) * LANES


def pack(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Keys and values [..., D] as the pools store them: (k, v) of [..., lanes], or (both, None)."""
    wide = lanes(k.shape[-1])

    def pad(x):
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, wide - x.shape[-1]),))

    return (pad(jnp.concatenate([k, v], axis=-1)), None) if joint(k.shape[-1]) else (pad(k), pad(v))
