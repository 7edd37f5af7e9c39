"""Bad words as token ids: single tokens are never drawn, longer ones are stopped before their last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsejax.engine.params import MAX_BIAS_ENTRIES
from sparsejax.errors import RequestError


@dataclass(frozen=True)
class BadWords:
    """Compiled ``bad_words``.

    Attributes:
        never: tokens that are a whole bad word; ``pack_row(never=...)`` takes them out for good.
        sequences: bad words of several tokens; ``banned_next`` says when their last token is due.
    """

    never: tuple[int, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()

    @property
    def needs_history(self) -> bool:
        """Whether the host must see each token before the next can be drawn."""
        return bool(self.sequences)


def compile_bad_words(words: Sequence[str], tokenizer: Any, biased: int = 0) -> BadWords:
    """Token ids of each word, as it is and after a space.

    Args:
        words: the request's bad_words.
        tokenizer: anything with ``encode(text, add_special_tokens=False)``.
        biased: entries of the request's logit_bias; bans share its room.

    Raises:
        RequestError: no tokenizer, a word without tokens, or more words than fit.
    """
    if not words:
        return BadWords()
    if tokenizer is None:
        raise RequestError(
            "bad_words needs a tokenizer, and this engine has none. Use logit_bias with token ids instead.",
            parameter="bad_words",
            value=words,
        )
    never: dict[int, None] = {}
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        variants = {tuple(_encode(tokenizer, text)) for text in (word, " " + word.lstrip())}
        variants.discard(())
        if not variants:
            raise RequestError(
                f"bad_words entry {word!r} has no tokens in this model. Remove it.",
                parameter="bad_words",
                value=word,
            )
        for ids in sorted(variants):
            if len(ids) == 1:
                never[ids[0]] = None
            else:
                sequences[ids] = None
    last = {ids[-1] for ids in sequences} - never.keys()
    if len(last) + biased > MAX_BIAS_ENTRIES:
        raise RequestError(
            f"bad_words needs up to {len(last)} bans beside {biased} logit_bias entries; "
            f"at most {MAX_BIAS_ENTRIES} fit. Give fewer words.",
            parameter="bad_words",
            value=len(words),
        )
    kept = tuple(ids for ids in sequences if ids[-1] not in never)
    return BadWords(tuple(never), kept)


def banned_next(bad: BadWords, output_ids: Sequence[int]) -> list[int]:
    """Tokens that would complete a bad word after ``output_ids``; sorted, without repeats."""
    found = set()
    for ids in bad.sequences:
        start = len(ids) - 1
        if len(output_ids) >= start and tuple(output_ids[-start:]) == ids[:-1]:
            found.add(ids[-1])
    return sorted(found)


def _encode(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoded, "ids", encoded))
