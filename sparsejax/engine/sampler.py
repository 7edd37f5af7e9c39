"""Sampling on the device: a batch of logits and per-row parameters, all data, to tokens and logprobs.

Pure functions without compile-time options, so one program serves every mix of requests. Every operation
stays inside its row: a seeded row draws the same token at any batch position and size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from sparsejax.engine.filters import draw, keep_top_k, keep_top_p
from sparsejax.engine.params import MAX_LOGPROBS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters and history of the B rows of a step. W = ceil(V / 32) words of a token bitmask.

    Attributes:
        step: index of the output token being sampled; the draw's key is fold_in(key(seed), step).
        num_logprobs: alternatives to return: -1 or 0 for none, up to 20.
        stop_ids: EOS and stop ids, -1 padded; not drawn while ``step < min_tokens``.
        bias_ids, bias_values: added to these tokens' logits, ids -1 padded; -inf bans.
        allowed, prompt_mask: token t is bit t % 32 of word t // 32.
        output_counts: how often each token was generated so far.
    """

    temperature: Float32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    presence: Float32[Array, " B"]
    frequency: Float32[Array, " B"]
    repetition: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    seed: UInt32[Array, " B"]
    step: Int32[Array, " B"]
    min_tokens: Int32[Array, " B"]
    num_logprobs: Int32[Array, " B"]
    stop_ids: Int32[Array, "B 32"]
    bias_ids: Int32[Array, "B 320"]
    bias_values: Float32[Array, "B 320"]
    allowed: Int32[Array, "B W"]
    prompt_mask: Int32[Array, "B W"]
    output_counts: Int32[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """Tokens with their log-probability and rank (1 is best) under the raw logits.

    ``logprob`` is -inf only where the row had no finite logit at all: the model's output is broken there.
    ``top_ids``/``top_logprobs`` are descending, -1/-inf where there is none; None when never computed.
    """

    token: Int32[Array, " B"]
    logprob: Float32[Array, " B"]
    rank: Int32[Array, " B"]
    top_ids: Int32[Array, "B 20"] | None = None
    top_logprobs: Float32[Array, "B 20"] | None = None


def _finite(logits: Float[Array, "B V"]) -> Float32[Array, "B V"]:
    """Float32 logits with NaN as -inf and +inf as the largest finite number."""
    x = logits.astype(jnp.float32)
    return jnp.where(jnp.isnan(x), -jnp.inf, jnp.minimum(x, jnp.finfo(jnp.float32).max))


def _first_at(x: Float32[Array, "B V"], best: Float32[Array, " B"]) -> Int32[Array, " B"]:
    """Index of the first ``best`` in each row.

    A float minimum, exact for V below 2**24: on CPU it vectorises, argmax and integer reductions do not.
    """
    index = lax.broadcasted_iota(jnp.float32, x.shape, 1)
    last = float(x.shape[1] - 1)
    return jnp.min(jnp.where(x == best[:, None], index, last), axis=-1).astype(jnp.int32)


def _log_sum_exp(x: Float32[Array, "B V"], best: Float32[Array, " B"]) -> Float32[Array, " B"]:
    """Log of the summed exponentials, 0 for rows without a finite value."""
    anchor = jnp.where(best > -jnp.inf, best, 0.0)
    total = jnp.sum(jnp.exp(x - anchor[:, None]), axis=-1)
    return jnp.where(best > -jnp.inf, anchor + jnp.log(total), 0.0)


def _unpack(words: Int32[Array, "B W"], vocab: int) -> Bool[Array, "B V"]:
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab] == 1


def sample_greedy(logits: Float[Array, "B V"]) -> Sampled:
    """Most likely token of each row (the first among equals) and its log-probability; no alternatives."""
    x = _finite(logits)
    best = jnp.max(x, axis=-1)
    token = _first_at(x, best)
    logprob = jnp.where(best > -jnp.inf, best - _log_sum_exp(x, best), -jnp.inf)
    return Sampled(token, logprob, jnp.ones_like(token))


def sample(logits: Float[Array, "B V"], rows: SamplingRows) -> Sampled:
    """One token per row: allowed set, bias, min_tokens, penalties, temperature, min_p, top_k, top_p, draw.

    Log-probabilities and ranks are of the unmodified logits. Temperature 0 takes the best token after the
    penalties. A row whose every token is forbidden falls back to its unmodified logits. What no row of the
    batch asks for is skipped at run time.
    """
    raw = _finite(logits)
    best = jnp.max(raw, axis=-1)
    log_total = _log_sum_exp(raw, best)
    plain = ~(_any_edit(rows) | jnp.any(rows.temperature > 0))
    token = lax.cond(plain, lambda raw, best, rows: _first_at(raw, best), _choose, raw, best, rows)
    return _describe(raw, best, log_total, token, rows.num_logprobs)


def score(
    logits: Float[Array, "T V"], tokens: Int32[Array, " T"], num_logprobs: Int32[Array, " T"]
) -> Sampled:
    """Log-probability, rank and alternatives of given tokens, as ``sample`` reports them."""
    raw = _finite(logits)
    best = jnp.max(raw, axis=-1)
    return _describe(raw, best, _log_sum_exp(raw, best), tokens, num_logprobs)


def advance(rows: SamplingRows, token: Int32[Array, " B"], active: Bool[Array, " B"]) -> SamplingRows:
    """Rows after ``token`` was appended to each active row: next step, token counted."""
    row = jnp.arange(token.shape[0])
    counts = rows.output_counts.at[row, token].add(active.astype(jnp.int32), mode="drop")
    return replace(rows, step=rows.step + active.astype(jnp.int32), output_counts=counts)


def _describe(raw, best, log_total, token, num_logprobs) -> Sampled:
    """Logprob, rank and, if any row asks, alternatives of ``token`` [B] under the raw logits [B, V]."""
    chosen = jnp.take_along_axis(raw, token[:, None], axis=-1)
    logprob = jnp.where(best > -jnp.inf, chosen[:, 0] - log_total, -jnp.inf)
    better = jnp.sum(jnp.where(raw > chosen, 1.0, 0.0), axis=-1)  # exact: V is below 2**24
    rank = 1 + better.astype(jnp.int32)
    width = min(MAX_LOGPROBS, raw.shape[1])
    short = ((0, 0), (0, MAX_LOGPROBS - width))

    def top(raw):
        values, ids = lax.top_k(raw, width)
        values = jnp.where(best[:, None] > -jnp.inf, values - log_total[:, None], -jnp.inf)
        return jnp.pad(ids, short, constant_values=-1), jnp.pad(values, short, constant_values=-jnp.inf)

    def none(raw):
        shape = (raw.shape[0], MAX_LOGPROBS)
        return jnp.full(shape, -1, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)

    top_ids, top_logprobs = lax.cond(jnp.any(num_logprobs > 0), top, none, raw)
    return Sampled(token, logprob, rank, top_ids, top_logprobs)


def _penalised(rows: SamplingRows) -> Bool[Array, " B"]:
    return (rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1)


def _any_edit(rows: SamplingRows) -> Bool[Array, ""]:
    held_back = rows.step < rows.min_tokens
    banned = jnp.any(rows.allowed != -1) | jnp.any(rows.bias_ids >= 0)
    return banned | jnp.any(held_back) | jnp.any(_penalised(rows))


def _choose(raw, best, rows: SamplingRows) -> Int32[Array, " B"]:
    x = lax.cond(_any_edit(rows), edit_logits, lambda raw, rows: raw, raw, rows)
    token = _first_at(x, jnp.max(x, axis=-1))
    random = rows.temperature > 0
    drawn = lax.cond(jnp.any(random), _draw, lambda x, token, rows: token, x, token, rows)
    return jnp.where(random, drawn, token)


def edit_logits(raw: Float32[Array, "B V"], rows: SamplingRows) -> Float32[Array, "B V"]:
    """Allowed set, bias, min_tokens and penalties; rows left without any token keep their raw logits."""
    vocab = raw.shape[1]
    x = jnp.where(_unpack(rows.allowed, vocab), raw, -jnp.inf)
    row = jnp.arange(raw.shape[0])[:, None]
    # Out-of-range targets are dropped: that is where padding ids go (a negative index would wrap).
    x = x.at[row, jnp.where(rows.bias_ids < 0, vocab, rows.bias_ids)].add(rows.bias_values, mode="drop")
    held_back = (rows.step < rows.min_tokens)[:, None] & (rows.stop_ids >= 0)
    x = x.at[row, jnp.where(held_back, rows.stop_ids, vocab)].set(-jnp.inf, mode="drop")
    x = lax.cond(jnp.any(_penalised(rows)), _penalise, lambda x, rows: x, x, rows)
    return jnp.where(jnp.max(x, axis=-1, keepdims=True) > -jnp.inf, x, raw)


def _penalise(x: Float32[Array, "B V"], rows: SamplingRows) -> Float32[Array, "B V"]:
    """Repetition (Keskar et al. 2019, CTRL) on prompt and output, then frequency and presence on output."""
    counts = rows.output_counts
    repetition = rows.repetition[:, None]
    seen = _unpack(rows.prompt_mask, x.shape[1]) | (counts > 0)
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    x = x - rows.frequency[:, None] * counts.astype(jnp.float32)
    return x - jnp.where(counts > 0, rows.presence[:, None], 0.0)


def draw_weights(x: Float32[Array, "B V"], rows: SamplingRows) -> Float32[Array, "B V"]:
    """Temperature, min_p, top_k and top_p: weights proportional to the probabilities tokens are drawn with.

    The best token of a row has weight 1; a row without a finite value has only zeros.
    """
    peak = jnp.max(x, axis=-1, keepdims=True)
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    weights = jnp.exp((x - jnp.where(peak > -jnp.inf, peak, 0.0)) / temperature)
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0.0)

    def top_k(weights):
        kept = jnp.where(weights > 0, x, -jnp.inf)
        return jnp.where(keep_top_k(kept, rows.top_k), weights, 0.0)

    def top_p(weights):
        return jnp.where(keep_top_p(weights, rows.top_p), weights, 0.0)

    random = rows.temperature > 0
    weights = lax.cond(jnp.any(random & (rows.top_k > 0)), top_k, lambda w: w, weights)
    return lax.cond(jnp.any(random & (rows.top_p < 1)), top_p, lambda w: w, weights)


def _draw(x, fallback, rows: SamplingRows) -> Int32[Array, " B"]:
    token, drawable = draw(draw_weights(x, rows), jax.vmap(_key)(rows.seed, rows.step))
    return jnp.where(drawable, token, fallback)


def _key(seed: UInt32[Array, ""], step: Int32[Array, ""]) -> Array:
    # The implementation is named so that a user's default PRNG setting cannot change a seeded request.
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
