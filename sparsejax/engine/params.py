"""SamplingParams: how to sample one request. Names, defaults and rules are those of vLLM. Imports no JAX."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NoReturn

from sparsejax.engine.structured import StructuredOutputs
from sparsejax.engine.validate import check_bool, check_float, check_ids, check_int, check_texts, reject
from sparsejax.errors import RequestError

MAX_LOGPROBS = 20  # top alternatives per token the sampler returns
MAX_STOP_IDS = 32  # EOS and stop_token_ids of one row
MAX_BIAS_ENTRIES = 320  # logit_bias and running bans of one row
MIN_TEMPERATURE = 0.01  # smaller positive temperatures overflow float32 logits

_INT64 = 2**63
_RENAMED = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "sampling_seed": "seed",
    "top_logprobs": "logprobs",
    "do_sample": "temperature",
    "temp": "temperature",
    "no_stop_trim": "include_stop_str_in_output",
    "sequence_bias": "logit_bias",
}
_REMOVED = {
    "best_of": "Ask for n samples and rank them by cumulative_logprob.",
    "use_beam_search": "Beam search is not offered; use n samples with a temperature.",
    "num_beams": "Beam search is not offered; use n samples with a temperature.",
    "length_penalty": "Beam search is not offered; use n samples with a temperature.",
}


class RequestOutputKind(Enum):
    """What each RequestOutput of a running request carries."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # only what is new
    FINAL_ONLY = 2  # nothing until the request has finished


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Invalid or contradictory values raise RequestError at construction.

    Attributes:
        n: samples per prompt, sharing the prompt's pages; more than one needs a temperature above 0.
        temperature: in [0, 2]; 0 is greedy; values in (0, 0.01) are raised to 0.01.
        top_p: in (0, 1]; keep the smallest set of most likely tokens whose mass reaches it.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: in [0, 1]; drop tokens less likely than ``min_p`` times the most likely one.
        presence_penalty, frequency_penalty: in [-2, 2], on generated tokens, once or per occurrence.
        repetition_penalty: above 0; over 1 discourages tokens of the prompt and the output.
        seed: the request's own random stream, the same in any batch; None or -1 leaves it to the engine.
        stop: text(s) that end the output; needs ``detokenize``.
        stop_token_ids: further token ids that end the output (at most 32 together with EOS).
        bad_words: text(s) that are never generated, with and without a leading space.
        include_stop_str_in_output: keep the matched stop text.
        ignore_eos: generate on after EOS.
        max_tokens: output length limit; None means until the engine's ``max_model_len``.
        min_tokens: EOS and stop ids cannot be drawn before this many tokens.
        logprobs: N in 0..20: log-probabilities of the N best tokens and the chosen one, of the raw logits.
        prompt_logprobs: the same for the prompt's tokens.
        detokenize: produce text; False returns token ids only.
        skip_special_tokens, spaces_between_special_tokens: as the tokenizer's ``decode``.
        logit_bias: {token id: bias}, clamped to [-100, 100], at most 320 entries; string keys are read.
        allowed_token_ids: only these can be drawn.
        structured_outputs: a rule that the output follows (`StructuredOutputs` or a mapping): a JSON schema,
            a regular expression, a choice, a grammar or any JSON object.
        cache_salt: requests share cached prefixes only with those of the same salt; one per tenant keeps tenants from
            learning by the time to a first token what others have asked.
        keep_alive: seconds for which the engine keeps what the finished sequence has in the cache, evicted or not; the
            last output then carries a `conversation`. Pages are given up sooner where running requests need them.
        conversation: continues a kept conversation: the prompt is all that was said in it, prompts and answers token
            for token (or as one text), and then what is new. Its policy stays that of the first turn.
        output_kind: what each RequestOutput carries.
        sparsity: this request's sparsity policy (preset name, mapping or SparsityConfig); None is the
            engine's default.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    cache_salt: str | None = None
    keep_alive: float | None = None
    conversation: str | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    sparsity: object | str | None = None

    def __post_init__(self) -> None:
        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        self._check_combinations()
        if self.greedy:
            # Filters cannot change an argmax; neutral values let the engine see a plain greedy row.
            for name, value in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                object.__setattr__(self, name, value)

    def _checked(self) -> dict[str, Any]:
        """Every field checked alone and brought to its normal form."""
        out: dict[str, Any] = {"n": check_int("n", self.n, 1, None, "a whole number of at least 1")}
        t = check_float("temperature", self.temperature, 0.0, 2.0, "a number in [0, 2]", "Use 0 for greedy.")
        out["temperature"] = t if t == 0.0 else max(t, MIN_TEMPERATURE)
        out["top_p"] = check_float(
            "top_p", self.top_p, 0.0, 1.0, "a number in (0, 1]", "Use 1 to switch it off.", open_low=True
        )
        top_k = check_int("top_k", self.top_k, -1, 2**31 - 1, "at least 1, or 0 or -1 for off")
        out["top_k"] = max(top_k, 0)
        out["min_p"] = check_float(
            "min_p", self.min_p, 0.0, 1.0, "a number in [0, 1]", "Use 0 to switch it off."
        )
        for name in ("presence_penalty", "frequency_penalty"):
            out[name] = check_float(name, getattr(self, name), -2.0, 2.0, "a number in [-2, 2]")
        out["repetition_penalty"] = check_float(
            "repetition_penalty",
            self.repetition_penalty,
            0.0,
            3.0e38,
            "a finite number above 0",
            "Use 1 to switch it off.",
            open_low=True,
        )
        if self.seed is not None:
            seed = check_int("seed", self.seed, -_INT64, _INT64 - 1, "a 64-bit whole number or None")
            out["seed"] = None if seed == -1 else seed
        out["stop"] = check_texts("stop", self.stop)
        out["bad_words"] = check_texts("bad_words", self.bad_words)
        out["stop_token_ids"] = check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_IDS)
        if self.max_tokens is not None:
            out["max_tokens"] = check_int(
                "max_tokens",
                self.max_tokens,
                1,
                None,
                "a whole number of at least 1",
                "Use None to generate up to the engine's max_model_len.",
            )
        out["min_tokens"] = check_int("min_tokens", self.min_tokens, 0, None, "a whole number of at least 0")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                allowed = f"None or 0 to {MAX_LOGPROBS} (the limit of alternatives per token)"
                out[name] = check_int(
                    name, value, 0, MAX_LOGPROBS, allowed, f"Ask for at most {MAX_LOGPROBS}."
                )
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            check_bool(name, getattr(self, name))
        out["logit_bias"] = _check_bias(self.logit_bias)
        if self.allowed_token_ids is not None:
            out["allowed_token_ids"] = check_ids("allowed_token_ids", self.allowed_token_ids)
            if not out["allowed_token_ids"]:
                reject(
                    "allowed_token_ids",
                    self.allowed_token_ids,
                    "None or a list with at least one token id",
                    "Use None to allow every token.",
                )
        if self.structured_outputs is not None:
            out["structured_outputs"] = StructuredOutputs.coerce(self.structured_outputs)
        for name in ("cache_salt", "conversation"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                reject(name, value, "None or a non-empty string")
        if self.keep_alive is not None:
            out["keep_alive"] = check_float(
                "keep_alive", self.keep_alive, 0.0, 3e9, "None or a number of seconds above 0", open_low=True
            )
        out["output_kind"] = _check_kind(self.output_kind)
        return out

    def _check_combinations(self) -> None:
        for name in ("keep_alive", "conversation"):
            if self.n > 1 and getattr(self, name) is not None:
                reject("n", self.n, f"1 beside {name}", "A conversation has one answer to go on from.")
        if self.conversation is not None and self.prompt_logprobs is not None:
            reject(
                "prompt_logprobs", self.prompt_logprobs, "None beside conversation",
                "What was said before is not computed again: leave conversation out.",
            )  # fmt: skip
        if self.n > 1 and self.greedy:
            reject("n", self.n, "1 when temperature is 0", "Greedy samples are equal: raise temperature.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            reject(
                "min_tokens",
                self.min_tokens,
                f"at most max_tokens ({self.max_tokens})",
                "Lower min_tokens or raise max_tokens.",
            )
        if self.stop and not self.detokenize:
            reject(
                "stop",
                self.stop,
                "empty when detokenize is False",
                "Stop strings are found in text: set detokenize=True or use stop_token_ids.",
            )
        if self.include_stop_str_in_output and not self.detokenize:
            reject(
                "include_stop_str_in_output", True, "False when detokenize is False", "Set detokenize=True."
            )
        for name in ("bad_words", "allowed_token_ids", "min_tokens", "ignore_eos") if self.structured_outputs else ():
            if getattr(self, name):
                reject(
                    name,
                    getattr(self, name),
                    "left at its default beside structured_outputs",
                    "The rule alone decides which tokens may come and where the output ends.",
                )
        self._check_can_continue(self.stop_token_ids or ())

    def _check_can_continue(self, stops: Sequence[int]) -> None:
        allowed = self.allowed_token_ids
        if self.min_tokens and allowed is not None and set(allowed) <= set(stops):
            reject(
                "allowed_token_ids",
                allowed,
                "more than EOS and stop ids when min_tokens is set",
                "Every allowed token would end the output: allow another or set min_tokens=0.",
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def plain_greedy(self) -> bool:
        """Whether the most likely token of the raw logits is the answer, without alternatives."""
        edits = self.penalised or self.logit_bias or self.allowed_token_ids or self.bad_words
        edits = edits or self.structured_outputs
        return self.greedy and not edits and self.min_tokens == 0 and not self.logprobs

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping; an unknown key is a RequestError with the likely meant name."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key in known:
                continue
            if key in _REMOVED:
                _unknown(key, values[key], _REMOVED[key])
            near = [_RENAMED[key]] if key in _RENAMED else difflib.get_close_matches(str(key), known, 1, 0.6)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known parameters: {', '.join(known)}."
            _unknown(key, values[key], hint)
        return cls(**values)

    @classmethod
    def coerce(cls, value: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
        """None is the defaults, a mapping goes through ``from_dict``, SamplingParams pass through."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise RequestError(
            f"sampling_params is a {type(value).__name__}; give SamplingParams, a mapping or None.",
            parameter="sampling_params",
            value=value,
        )

    def check_model(self, vocab_size: int, eos_ids: Sequence[int] = (), max_len: int | None = None) -> None:
        """Raise RequestError for what only the model decides: ids beyond V, too many stop ids, lengths."""
        ids = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids,
        }
        for name, values in ids.items():
            beyond = [i for i in values or () if i >= vocab_size]
            if beyond:
                reject(name, beyond[:5], f"ids below the vocabulary size {vocab_size}", "Remove these ids.")
        stops = self.all_stop_ids(eos_ids)
        if len(stops) > MAX_STOP_IDS:
            reject(
                "stop_token_ids",
                self.stop_token_ids,
                f"at most {MAX_STOP_IDS} ids together with the model's {len(eos_ids)} EOS ids",
                "Give fewer ids or set ignore_eos=True.",
            )
        self._check_can_continue(stops)
        if max_len is not None and self.min_tokens >= max_len:
            reject(
                "min_tokens",
                self.min_tokens,
                f"below the engine's max_model_len ({max_len})",
                "Lower min_tokens or raise max_model_len.",
            )

    def all_stop_ids(self, eos_ids: Sequence[int] = ()) -> tuple[int, ...]:
        """Ids that end this request: EOS (unless ignored), then stop_token_ids, without repeats."""
        first = () if self.ignore_eos else tuple(eos_ids)
        return tuple(dict.fromkeys(first + tuple(self.stop_token_ids or ())))


def _unknown(key: Any, value: Any, hint: str) -> NoReturn:
    raise RequestError(f"Unknown sampling parameter {key!r}. {hint}", parameter=str(key), value=value)


def _check_bias(value: Any) -> dict[int, float] | None:
    if not value and (value is None or isinstance(value, Mapping)):
        return None
    allowed = f"a mapping of at most {MAX_BIAS_ENTRIES} token ids to finite numbers"
    if not isinstance(value, Mapping) or len(value) > MAX_BIAS_ENTRIES:
        reject("logit_bias", value, allowed)
    bias: dict[int, float] = {}
    for key, amount in value.items():
        token = int(key) if isinstance(key, str) and key.strip().isdecimal() else key
        token = check_int("logit_bias", token, 0, 2**31 - 1, allowed, "Use token ids of at least 0 as keys.")
        bias[token] = min(max(check_float("logit_bias", amount, -3e38, 3e38, allowed), -100.0), 100.0)
    return bias


def _check_kind(value: Any) -> RequestOutputKind:
    names = RequestOutputKind.__members__
    if isinstance(value, str) and value.upper() in names:
        return names[value.upper()]
    if not isinstance(value, RequestOutputKind):
        reject("output_kind", value, f"one of {', '.join(names)}")
    return value
