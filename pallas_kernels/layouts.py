"""Physical shapes of dense pools.

Plain pools are [N, K, P, D], one for K and one for V. A TPU stores the two minor dimensions in tiles of 128
lanes and copies whole tiles; with a narrower minor dimension XLA would re-lay the whole pool around every
kernel call. There

* head dims that are multiples of 128 are plain;
* head dims up to 64 store K and V side by side in one pool [N, K, P, 128], K in [..., :D] and V in
  [..., D:2D], and `v_pages` is None;
* others are padded with zeros to the next multiple of 128 (80 and 96 to 128, 192 to 256).

Every op takes pools in any of these shapes: the head dim is that of q or of the new tokens. Lanes past the
stored values must be finite wherever a token is: pools start as zeros and writes pad with zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES = 128


def tpu_pools(head_dim: int) -> tuple[int, int]:
    """(number of pools, minor dimension) that store K and V of this head dim on a TPU."""
    return 1 if 2 * head_dim <= LANES else 2, -(-head_dim // LANES) * LANES


def pack(k: jax.Array, v: jax.Array, lanes: int, pools: int) -> tuple[jax.Array, jax.Array | None]:
    """Keys and values [..., D] as `pools` pools of minor dimension `lanes` store them."""
    if pools == 1:
        return _pad(jnp.concatenate([k, v], axis=-1), lanes), None
    return _pad(k, lanes), _pad(v, lanes)


def columns(
    k_pages: jax.Array, v_pages: jax.Array | None, head_dim: int
) -> tuple[tuple[jax.Array, slice], tuple[jax.Array, slice]]:
    """The pool that holds the keys and its columns with them, and the same of the values."""
    if v_pages is None:
        return (k_pages, slice(0, head_dim)), (k_pages, slice(head_dim, 2 * head_dim))
    return (k_pages, slice(0, head_dim)), (v_pages, slice(0, head_dim))


def views(
    k_pages: jax.Array, v_pages: jax.Array | None, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [..., D] out of pools in any of the shapes. A copy where the pools are not plain."""
    (k, keys), (v, values) = columns(k_pages, v_pages, head_dim)
    return k[..., keys], v[..., values]


def _pad(x: jax.Array, lanes: int) -> jax.Array:
    spare = lanes - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, spare),)) if spare else x
