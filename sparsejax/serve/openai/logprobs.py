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

    def decode(self, tokens: list[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(tokens)

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
        text = texts.decode([token]) if entry is None else texts.text(token, entry[token])
        out["tokens"].append(text)
        out["text_offset"].append(offset)
        offset += len(text)
        out["token_logprobs"].append(None if entry is None else _number(entry[token].logprob))
        best = None if entry is None or not count else [*_best(entry, count), (token, entry[token])]
        out["top_logprobs"].append(best and {texts.text(*one): _number(one[1].logprob) for one in best})
    return out


def chat_logprobs(texts: TokenTexts, tokens: list[int], entries: list[dict[int, Logprob]], count: int) -> dict:
    """`/v1/chat/completions`: one object per token with its best alternatives."""
    content = []
    for token, entry in zip(tokens, entries, strict=True):
        best = [_one(texts, *one) for one in _best(entry, count)]
        content.append({**_one(texts, token, entry[token]), "top_logprobs": best})
    return {"content": content, "refusal": None}


def _best(entry: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    return sorted(entry.items(), key=lambda item: -item[1].logprob)[:count]


def _one(texts: TokenTexts, token: int, entry: Logprob) -> dict[str, Any]:
    return {
        "token": texts.text(token, entry),
        "logprob": _number(entry.logprob),
        "bytes": texts.bytes(token, entry),
    }


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)
