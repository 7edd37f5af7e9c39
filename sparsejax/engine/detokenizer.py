"""Token ids to text, piece by piece: never half a character, stop strings across pieces, exact in the end.

Text is decoded in a short window of tokens that starts at the last two places where everything was readable:
what the window's text grew by is new. One algorithm serves every tokenizer and costs two decodes of a few
tokens per step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.stop import StopMatcher

_UNREADABLE = "\ufffd"
_CONTEXT_TOKENS = 6  # prompt tokens that decide how the first output token is spaced
_LONG_HOLD = 8  # unreadable tokens after which a place to cut is looked for; a character has at most 4


class TextDecoder:
    """What decoding needs to know of a tokenizer; made once, shared by all requests.

    Args:
        tokenizer: a transformers tokenizer, a ``tokenizers.Tokenizer`` or anything with
            ``decode(ids, skip_special_tokens=...)``. Fast tokenizers are decoded by their Rust core;
            ``clean_up_tokenization_spaces`` is not applied, it would change text already streamed.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        core = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        if core is None and hasattr(tokenizer, "get_added_tokens_decoder"):
            core = tokenizer
        self._core = core
        self.byte_ids = self._find_byte_ids()
        self._special: frozenset[int] = frozenset()
        if core is not None:
            added = core.get_added_tokens_decoder()
            self._special = frozenset(index for index, token in added.items() if token.special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, space_special: bool = True) -> str:
        """Text of ``ids`` as one whole."""
        if self._core is not None:
            return self._core.decode(ids, skip_special_tokens=skip_special)
        extra = {} if space_special else {"spaces_between_special_tokens": False}
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special, **extra)

    def token_text(self, token: int) -> str:
        """Text of one token alone, special ones shown; for logprob reports."""
        return self.decode([token], skip_special=False)

    def silent(self, token: int, skip_special: bool) -> bool:
        """Whether decoding drops this id before it looks at its neighbours (special or unknown)."""
        if self._core is None:
            return False
        return (skip_special and token in self._special) or self._core.id_to_token(token) is None

    def _find_byte_ids(self) -> frozenset[int]:
        """Ids of byte-fallback tokens: a run of them is decoded as a whole and can turn unreadable late."""
        to_id = getattr(self._core, "token_to_id", None) or getattr(
            self._tokenizer, "convert_tokens_to_ids", None
        )
        if to_id is None:
            return frozenset()
        ids = [to_id(f"<0x{byte:02X}>") for byte in range(256)]
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        return frozenset(i for i in ids if i is not None and i != unknown)


class _Window:
    """Incremental text of one token stream."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], byte_ids: frozenset[int], context: Sequence[int]
    ):
        self._decode = decode
        self._byte_ids = byte_ids
        self._ids = list(context)
        self._read = len(self._ids)  # ids before this are fully released
        # Text of the window that is already out. A character the prompt left open belongs to the output.
        self._sent = decode(self._ids).rstrip(_UNREADABLE) if self._ids else ""

    def step(self, token: int) -> str:
        """Add a token, return the text that became certain."""
        self._ids.append(token)
        if token in self._byte_ids:
            return ""
        text = self._decode(self._ids)
        certain = text.rstrip(_UNREADABLE)
        delta = self._grown(certain)
        if certain == text and delta:
            self._advance()
        elif len(self._ids) - self._read > _LONG_HOLD:
            delta += self._cut(text)
        return delta

    def tentative(self) -> str:
        """Readable text of an open run of byte tokens; a later byte may still spoil it."""
        if not self._ids or self._ids[-1] not in self._byte_ids:
            return ""
        text = self._decode(self._ids)
        return "" if text.endswith(_UNREADABLE) else _beyond(self._sent, text)

    def flush(self) -> str:
        """All that is left, with unreadable bytes as the tokenizer shows them."""
        return self._grown(self._decode(self._ids)) if self._ids else ""

    def _grown(self, text: str) -> str:
        delta = _beyond(self._sent, text)
        if delta:
            self._sent = text
        return delta

    def _advance(self) -> None:
        """All is released: tokens before the old ``read`` go, the newer ones stay as context for spacing."""
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._sent = self._decode(self._ids)

    def _cut(self, text: str) -> str:
        """Bound the window in endless unreadable output: cut before the last token if nothing spans the cut.

        Nothing does if both sides decoded alone give the whole text; what is left of the cut is then certain.
        """
        left, last = self._decode(self._ids[:-1]), self._decode(self._ids[-1:])
        kept = self._ids[-3:]
        context = self._decode(kept[:-1])
        if not context or left + last != text or context + last != self._decode(kept):
            return ""
        delta = _beyond(self._sent, left)
        self._ids, self._read = kept, len(kept) - 1
        self._sent = context + self._sent[len(left) :]
        return delta


def _beyond(sent: str, text: str) -> str:
    """What ``text`` has after ``sent``; they share a beginning unless a tokenizer rewrites earlier text."""
    if text.startswith(sent):
        return text[len(sent) :]
    return text[len(os.path.commonprefix((sent, text))) :] if len(text) > len(sent) else ""


class Detokenizer:
    """The text of one output.

    The prompt's last tokens serve as context, so that prompt text plus output text is the decoded whole, also
    with tokenizers that drop the first token's leading space. Without ``prompt_ids`` the text is exactly
    ``tokenizer.decode(output_ids)``.

    Args:
        tokenizer: a TextDecoder, anything TextDecoder takes, or None for no text.
        prompt_ids: token ids before the output.
        params: stop strings, ``min_tokens`` and text options.

    Attributes:
        text: everything released so far.
        stopped: the stop string that ended the text, or None.
        num_tokens: tokens taken; after a stop, the tokens up to the one that completed it.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], params: SamplingParams):
        self.text = ""
        self.num_tokens = 0
        self._min_tokens = params.min_tokens
        self._skip_special = params.skip_special_tokens
        self._matcher = StopMatcher(params.stop or (), include=params.include_stop_str_in_output)
        self._watching = bool(params.stop)
        self._decoder: TextDecoder | None = None
        if tokenizer is None or not params.detokenize:
            return
        decoder = tokenizer if isinstance(tokenizer, TextDecoder) else TextDecoder(tokenizer)
        skip, space = params.skip_special_tokens, params.spaces_between_special_tokens
        self._decoder = decoder
        self._window = _Window(
            lambda ids: decoder.decode(ids, skip_special=skip, space_special=space),
            decoder.byte_ids,
            self._context(prompt_ids),
        )

    @property
    def stopped(self) -> str | None:
        return self._matcher.matched

    def push(self, token_ids: Iterable[int]) -> str:
        """Add generated tokens, return the text they released. Tokens after a stop are not taken.

        A stop token's own text is shown if it is pushed: leave out an EOS or stop id that should not be.
        """
        released = ""
        for token in token_ids:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            if self._decoder is not None:
                released += self._push_one(int(token))
        self.text += released
        return released

    def finish(self) -> str:
        """The output has ended: release what was held back."""
        if self._decoder is None or self.stopped is not None:
            return ""
        released = self._matcher.feed(self._window.flush(), armed=self.num_tokens > self._min_tokens)
        if self.stopped is None:
            released += self._matcher.flush()
        self.text += released
        return released

    def _push_one(self, token: int) -> str:
        if self._decoder.silent(token, self._skip_special):
            return ""
        armed = self.num_tokens > self._min_tokens
        released = self._matcher.feed(self._window.step(token), armed=armed)
        if self._watching and armed and self.stopped is None:
            tentative = self._window.tentative()
            if tentative and self._matcher.would_match(tentative):
                released += self._matcher.feed(tentative)
        return released

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        kept: list[int] = []
        for token in reversed(prompt_ids):
            if not self._decoder.silent(int(token), self._skip_special):
                kept.append(int(token))
                if len(kept) == _CONTEXT_TOKENS:
                    break
        return kept[::-1]
