"""One request's sampling parameters as the arrays of one row of SamplingRows. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from sparsejax.engine.params import MAX_BIAS_ENTRIES, MAX_STOP_IDS, SamplingParams
from sparsejax.errors import RequestError


def mix_seed(seed: int, index: int = 0) -> int:
    """The 32-bit seed of sample ``index`` of a request (splitmix64, Steele et al. 2014).

    Seeds below 2**32 are kept for sample 0; further samples and wider seeds are hashed, so that sample 1 of
    seed 7 is not sample 0 of seed 8.
    """
    if index == 0 and 0 <= seed < 2**32:
        return seed
    mask = 2**64 - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & 0xFFFFFFFF


def mask_words(vocab_size: int) -> int:
    """Words of a token bitmask."""
    return -(-vocab_size // 32)


def pack_mask(bits: np.ndarray) -> np.ndarray:
    """bool [V] to int32 [ceil(V/32)]: token t is bit t % 32 of word t // 32."""
    padded = np.zeros(mask_words(len(bits)) * 32, bool)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32).view(np.int32)


def mask_of(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Bitmask int32 [ceil(V/32)] of the given token ids."""
    bits = np.zeros(vocab_size, bool)
    bits[np.fromiter(ids, np.int64)] = True
    return pack_mask(bits)


def neutral_row(vocab_size: int) -> dict[str, np.ndarray]:
    """A greedy row that changes nothing; what padding rows hold."""
    f, i = np.float32, np.int32
    words = mask_words(vocab_size)
    return {
        "temperature": np.array(0, f),
        "top_p": np.array(1, f),
        "min_p": np.array(0, f),
        "presence": np.array(0, f),
        "frequency": np.array(0, f),
        "repetition": np.array(1, f),
        "top_k": np.array(0, i),
        "seed": np.array(0, np.uint32),
        "step": np.array(0, i),
        "min_tokens": np.array(0, i),
        "num_logprobs": np.array(-1, i),
        "stop_ids": np.full(MAX_STOP_IDS, -1, i),
        "bias_ids": np.full(MAX_BIAS_ENTRIES, -1, i),
        "bias_values": np.zeros(MAX_BIAS_ENTRIES, f),
        "allowed": np.full(words, -1, i),
        "prompt_mask": np.zeros(words, i),
        "output_counts": np.zeros(vocab_size, i),
    }


def pack_row(
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    vocab_size: int,
    eos_ids: Sequence[int],
    seed: int,
    *,
    never: Sequence[int] = (),
    banned: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """One row of SamplingRows.

    Args:
        params: validated against the model (``SamplingParams.check_model``).
        prompt_ids, output_ids: the request so far; the token to sample has index ``len(output_ids)``.
        seed: used when ``params.seed`` is None; pass ``mix_seed(params.seed, index)`` for further samples.
        never: ids that are never drawn (``BadWords.never``).
        banned: ids not drawn at this step only (``banned_next``); sent as bias -inf.

    Raises:
        RequestError: more than 320 bias entries and bans, or more than 32 stop ids.
    """
    row = neutral_row(vocab_size)
    values = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "presence": params.presence_penalty,
        "frequency": params.frequency_penalty,
        "repetition": params.repetition_penalty,
        "top_k": min(params.top_k, vocab_size),
        "seed": mix_seed(seed),
        "step": len(output_ids),
        "min_tokens": params.min_tokens,
        "num_logprobs": -1 if params.logprobs is None else params.logprobs,
    }
    for name, value in values.items():
        row[name] = np.array(value, row[name].dtype)
    stops = params.all_stop_ids(eos_ids)
    if len(stops) > MAX_STOP_IDS:
        raise RequestError(
            f"{len(stops)} EOS and stop ids were given; at most {MAX_STOP_IDS} fit. Give fewer.",
            parameter="stop_token_ids",
            value=params.stop_token_ids,
        )
    row["stop_ids"][: len(stops)] = stops
    row["bias_ids"], row["bias_values"] = pack_bias(params, banned)
    if params.allowed_token_ids is not None or never:
        allowed = np.full(vocab_size, params.allowed_token_ids is None)
        allowed[list(params.allowed_token_ids or ())] = True
        allowed[list(never)] = False
        row["allowed"] = pack_mask(allowed)
    if params.repetition_penalty != 1:
        row["prompt_mask"] = mask_of(prompt_ids, vocab_size)
    if params.penalised and len(output_ids):
        row["output_counts"] = np.bincount(output_ids, minlength=vocab_size).astype(np.int32)
    return row


def pack_bias(params: SamplingParams, banned: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Ids (-1 padded) and values of one row's biases; banned ids get -inf.

    Raises:
        RequestError: more than 320 biases and bans together.
    """
    bias = dict(params.logit_bias or {})
    bias.update((token, -np.inf) for token in banned)
    if len(bias) > MAX_BIAS_ENTRIES:
        raise RequestError(
            f"logit_bias and bad_words need {len(bias)} entries; at most {MAX_BIAS_ENTRIES} fit. Give fewer.",
            parameter="logit_bias",
            value=len(bias),
        )
    ids, values = np.full(MAX_BIAS_ENTRIES, -1, np.int32), np.zeros(MAX_BIAS_ENTRIES, np.float32)
    ids[: len(bias)] = list(bias)
    values[: len(bias)] = list(bias.values())
    return ids, values


def stack_rows(packed: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows of ``pack_row`` as one dict of [B, ...] arrays, ready for ``SamplingRows(**...)``."""
    return {name: np.stack([row[name] for row in packed]) for name in packed[0]}
