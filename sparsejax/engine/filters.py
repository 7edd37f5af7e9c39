"""Top-k, top-p and the draw of a token, without sorting and exact for every batch size.

Thresholds are found bit by bit: floats are mapped to integers of the same order, and each pass over the row
settles one bit of the largest threshold that still keeps enough (Knuth, TAOCP 5.2.2, radix exchange). On
CPU that is about 10 times faster than sorting, and nothing is scattered back. Probability mass is summed in
fixed point: integer sums do not depend on the order of addition, so a row keeps and draws the same tokens in
any batch. Ties at a threshold are all kept. V is below 2**24.
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

    ``amount_from(t)`` is what the row holds at or above t. ``settled(t, held)`` says that the ``held`` amount
    between t and the lowest value known to be too high is a single token: further bits change nothing.
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
        # Summed as floats, which are exact here and vectorise on CPU.
        return jnp.sum(jnp.where(key >= t[:, None], 1.0, 0.0), axis=-1).astype(jnp.int32)

    threshold = _largest_threshold(count_from, lambda t, held: held == 1, k, k > 0, top_bit=31)
    return key >= threshold[:, None]


def fixed_point(weights: Float[Array, "B V"]) -> tuple[Int32[Array, "B V"], Float[Array, " B"]]:
    """Weights in [0, 1] as integers whose sum over a row is about 2**29 to 2**30, and the scale of each row.

    The scale is a power of two found from integer sums alone, so it does not depend on the batch either.
    """
    scale = jnp.full(weights.shape[0], 2.0**12, jnp.float32)
    for _ in range(2):  # the second round removes the slack that the first needs for rounding
        scaled = jnp.round(weights * scale[:, None]).astype(jnp.int32)
        bound = jnp.sum(scaled, axis=-1) + weights.shape[1] // 2 + 1  # above the sum before rounding
        room = lax.clz(bound) - 2  # bound << room is below 2**30
        scale = scale * lax.bitcast_convert_type((room + 127) << 23, jnp.float32)
    return jnp.round(weights * scale[:, None]).astype(jnp.int32), scale


def keep_top_p(weights: Float[Array, "B V"], p: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """True for the fewest largest weights (and ties) whose share of the sum reaches p; p >= 1 keeps all."""
    mass, scale = fixed_point(weights)
    key = lax.bitcast_convert_type(jnp.abs(weights), jnp.int32)  # non-negative floats order as their bits
    total = jnp.sum(mass, axis=-1)
    need = jnp.clip(jnp.ceil(p * total.astype(jnp.float32)).astype(jnp.int32), 1, total)

    def mass_from(t):
        return jnp.sum(jnp.where(key >= t.astype(jnp.int32)[:, None], mass, 0), axis=-1)

    def settled(t, held):
        lightest = jnp.round(lax.bitcast_convert_type(t, jnp.float32) * scale).astype(jnp.int32)
        return held < 2 * lightest

    threshold = _largest_threshold(mass_from, settled, need, p < 1.0, top_bit=29)
    return key >= threshold.astype(jnp.int32)[:, None]


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
    mass, _ = fixed_point(weights)
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
