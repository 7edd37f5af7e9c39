"""Prompts in every form users pass them, checked before anything is queued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.validate import check_int
from sparsejax.errors import RequestError

MAPPING_KEYS = frozenset({"prompt", "prompt_token_ids", "compress_at"})


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    text: as it was given; None for token ids.
    compress_at: leading tokens after which the policy compresses the cache, before the rest of the prompt is read;
        None is the whole prompt.
    """

    text: str | None
    token_ids: list[int]
    compress_at: int | None = None

    @property
    def num_compressed(self) -> int:
        """Tokens after which the policy compresses the cache."""
        return self.compress_at or len(self.token_ids)


def split_prompts(prompts: Any) -> list[Any]:
    """One prompt or several, as a list: a str, a mapping or a flat list of token ids is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if not isinstance(prompts, (list, tuple)):
        raise _wrong_type(prompts)
    if prompts and all(isinstance(token, (int, np.integer)) for token in prompts):
        return [list(prompts)]
    return list(prompts)


def read_prompt(prompt: Any, tokenizer: Any, vocab_size: int) -> Prompt:
    """The token ids of one prompt.

    Raises:
        RequestError: it is empty, of a wrong type, has ids outside the vocabulary, is text without a tokenizer to
            read it, or is to be compressed at a place outside of it.
    """
    if isinstance(prompt, Mapping):
        others = sorted(map(str, set(prompt) - MAPPING_KEYS))
        if others and not set(prompt).isdisjoint(("prompt", "prompt_token_ids")):
            raise RequestError(
                f"a prompt mapping does not take {', '.join(map(repr, others))}, only "
                f"{', '.join(map(repr, sorted(MAPPING_KEYS)))}; cache_salt is a field of SamplingParams.",
                parameter="prompt",
                value=prompt,
            )
        if "prompt_token_ids" in prompt:
            read = Prompt(prompt.get("prompt"), _check_ids(prompt["prompt_token_ids"], vocab_size))
            return _with_compress_at(read, prompt.get("compress_at"))
        if "prompt" in prompt:
            read = read_prompt(prompt["prompt"], tokenizer, vocab_size)
            return _with_compress_at(read, prompt.get("compress_at"))
        raise RequestError(
            f"a prompt mapping has the keys {sorted(map(str, prompt))}; give 'prompt' or 'prompt_token_ids'.",
            parameter="prompt",
            value=prompt,
        )
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "the prompt is text, but this model directory has no tokenizer: pass token ids as "
                '{"prompt_token_ids": [...]}, or tokenizer="DIR" to the engine.',
                parameter="prompt",
                value=prompt,
            )
        ids = tokenizer.encode(prompt)
        if not prompt or not ids:
            raise RequestError(
                "the prompt is empty: give at least one token.", parameter="prompt", value=prompt
            )
        return Prompt(prompt, _check_ids(ids, vocab_size))
    if isinstance(prompt, (list, tuple, np.ndarray)):
        return Prompt(None, _check_ids(prompt, vocab_size))
    raise _wrong_type(prompt)


def _with_compress_at(prompt: Prompt, compress_at: Any) -> Prompt:
    if compress_at is None:
        return prompt
    length = len(prompt.token_ids)
    allowed = f"a whole number from 1 to the {length} tokens of the prompt"
    return replace(prompt, compress_at=check_int("compress_at", compress_at, 1, length, allowed))


def check_length(num_prompt: int, params: SamplingParams, max_model_len: int) -> int:
    """How many tokens the request may generate.

    Raises:
        RequestError: the prompt leaves no room for an output token.
    """
    if num_prompt >= max_model_len:
        raise RequestError(
            f"the prompt has {num_prompt} tokens, but max_model_len={max_model_len} leaves room for at most "
            f"{max_model_len - 1}: shorten it, or raise max_model_len if the model allows it.",
            parameter="prompt",
            value=num_prompt,
            code="context_length_exceeded",
        )
    room = max_model_len - num_prompt
    return room if params.max_tokens is None else min(params.max_tokens, room)


def _check_ids(ids: Any, vocab_size: int) -> list[int]:
    if not isinstance(ids, (list, tuple, np.ndarray)):
        raise _wrong_type(ids)
    if not len(ids):
        raise RequestError("the prompt is empty: give at least one token.", parameter="prompt", value=[])
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise RequestError(
                f"prompt token {place} is {token!r}; token ids are integers.", parameter="prompt", value=token
            )
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"prompt token {place} is {token}, outside the vocabulary of {vocab_size} ids (0 to {vocab_size - 1}).",
                parameter="prompt",
                value=int(token),
            )
    return [int(token) for token in ids]


def _wrong_type(prompt: Any) -> RequestError:
    return RequestError(
        f"a prompt is a {type(prompt).__name__}; give text, a list of token ids or "
        '{"prompt_token_ids": [...]}, or a list of these.',
        parameter="prompt",
        value=prompt,
    )
