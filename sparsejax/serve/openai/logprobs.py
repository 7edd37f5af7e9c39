"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import re
from typing import Any

from sparsejax.engine.request import Logprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _printable_bytes() -> dict[str, int]:
    """The characters by which byte-level tokenizers (GPT-2's scheme) spell bytes in their vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + place): byte for place, byte in enumerate(rest)}}


_BYTE_LEVEL = _printable_bytes()


class TokenTexts:
    """How tokens are shown: their text, and their bytes also where a token is a part of a character."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def text(self, token: int, entry: Logprob) -> str:
        return entry.decoded_token if entry.decoded_token is not None else f"token_id:{token}"

    def bytes(self, token: int, entry: Logprob) -> list[int]:
        text = self.text(token, entry)
        if "\ufffd" in text and self._tokenizer is not None:
            spelled = self._tokenizer.convert_ids_to_tokens(token) or ""
            if match := _BYTE.fullmatch(spelled):
                return [int(match[1], 16)]
            if all(character in _BYTE_LEVEL for character in spelled):
                return [_BYTE_LEVEL[character] for character in spelled]
        return list(text.encode())


def completion_logprobs(
    texts: TokenTexts, tokens: list[int], entries: list[dict[int, Logprob] | None], count: int, offset: int
) -> dict[str, Any]:
    """`/v1/completions`: parallel lists; the first token of a prompt has no log-probability.

    Args:
        count: alternatives that were asked for.
        offset: characters before the first token.
    """
    out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, entry in zip(tokens, entries, strict=True):
        own = entry[token] if entry else Logprob(LOWEST, decoded_token=texts.text(token, _unknown(texts, token)))
        text = texts.text(token, own)
        out["text_offset"].append(offset)
        offset += len(text)
        out["tokens"].append(text)
        out["token_logprobs"].append(_number(own.logprob) if entry else None)
        best = sorted((entry or {}).items(), key=lambda item: -item[1].logprob)[: max(count, 1)] if entry else []
        top = {texts.text(other, its): _number(its.logprob) for other, its in best}
        out["top_logprobs"].append({**top, text: _number(own.logprob)} if entry and count else None)
    return out


def chat_logprobs(texts: TokenTexts, tokens: list[int], entries: list[dict[int, Logprob]], count: int) -> dict:
    """`/v1/chat/completions`: one object per token with its best alternatives."""
    content = []
    for token, entry in zip(tokens, entries, strict=True):
        best = sorted(entry.items(), key=lambda item: -item[1].logprob)[:count]
        content.append({**_one(texts, token, entry[token]), "top_logprobs": [_one(texts, *item) for item in best]})
    return {"content": content, "refusal": None}


def _one(texts: TokenTexts, token: int, entry: Logprob) -> dict[str, Any]:
    return {
        "token": texts.text(token, entry),
        "logprob": _number(entry.logprob),
        "bytes": texts.bytes(token, entry),
    }


def _unknown(texts: TokenTexts, token: int) -> Logprob:
    tokenizer = texts._tokenizer
    return Logprob(LOWEST, decoded_token=None if tokenizer is None else tokenizer.decode([token]))


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)
