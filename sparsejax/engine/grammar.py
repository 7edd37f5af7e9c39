"""Constrained decoding: which tokens may come next, as a bitmask per step (llguidance does the parsing)."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsejax.engine.rows import mask_words
from sparsejax.engine.structured import StructuredOutputs
from sparsejax.engine.validate import reject
from sparsejax.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHED_GRAMMARS = 64
WHITESPACE = "( |\\n[ \\t]{0,32})?"
"""Between the parts of a JSON text: nothing, a space, or a new line with its indent. Never endless."""


class Constraint:
    """The grammar state of one output: `mask` says what may come next, `accept` takes what came.

    Attributes:
        mask: int32 ``[ceil(V / 32)]``: token t is bit t % 32 of word t // 32.
        ended: the text is complete; no further token can follow.
        broken: the parser gave up (its limits, or a token outside the mask); `error` says why.
    """

    def __init__(self, matcher: LLMatcher, num_tokens: int, num_words: int):
        self._matcher = matcher
        self._words = np.zeros(mask_words(num_tokens), np.int32)
        self.mask = self._words[:num_words]
        self.ended = self.broken = False
        self.error = ""
        self._fill()

    def accept(self, token: int) -> None:
        """Moves on by one token and renews the mask."""
        self._matcher.consume_token(token)
        self.ended = self._matcher.is_stopped()
        if not self.ended:
            self._fill()
        self.broken = self._matcher.is_error()
        self.error = self._matcher.get_error()

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)


class Grammars:
    """Compiles rules for one tokenizer and keeps the most recent ones. Safe to use from several threads.

    Args:
        tokenizer: the transformers tokenizer of the model, or None.
        vocab_size: V of the model.
        eos_ids: tokens that end an output.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Sequence[int]):
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, list(eos_ids)
        self._core: LLTokenizer | None = None
        self._num_tokens = 0
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, rule: StructuredOutputs) -> Constraint:
        """A fresh state of `rule`.

        Raises:
            RequestError: as for `compile`.
        """
        return Constraint(self.compile(rule).deep_copy(), self._num_tokens, mask_words(self._vocab_size))

    def compile(self, rule: StructuredOutputs) -> LLMatcher:
        """The parser of `rule` in its first state, compiled once.

        Raises:
            RequestError: the rule cannot be compiled, or there is no tokenizer or no llguidance.
        """
        key = rule.key
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is None:
                matcher = self._compiled[key] = self._compile(rule)
                if len(self._compiled) > CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return matcher

    def _compile(self, rule: StructuredOutputs) -> LLMatcher:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise RequestError(
                'structured_outputs needs llguidance: install it with pip install "sparsejax[serve]".',
                parameter="structured_outputs",
            ) from error
        core = self._tokens()
        matcher = LLMatcher(core, _grammar(rule), log_level=0)
        if matcher.is_error():
            reject("structured_outputs", rule.key[1][:200], "a rule that compiles", matcher.get_error()[:500])
        return matcher

    def _tokens(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        if self._core is None:
            if getattr(self._tokenizer, "backend_tokenizer", None) is None:
                raise RequestError(
                    "structured_outputs needs a fast tokenizer (tokenizer.json), and this model has none.",
                    parameter="structured_outputs",
                )
            self._num_tokens = max(self._vocab_size, len(self._tokenizer))
            eos = self._eos_ids or None
            self._core = from_tokenizer(self._tokenizer, n_vocab=self._num_tokens, eos_token=eos)
        return self._core


def _grammar(rule: StructuredOutputs) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    kind, text = rule.key
    if kind == "json":
        try:
            return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
        except ValueError as error:
            reject("structured_outputs", text[:200], "a JSON schema that can be read", f"{error}.")
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in rule.choice))
    if "::=" in text:
        try:
            text = gbnf_to_lark(text)
        except Exception as error:  # the converter raises this very class for most mistakes of a grammar
            reject("structured_outputs.grammar", text[:200], "a grammar in GBNF or Lark notation", str(error))
    return LLMatcher.grammar_from_lark(text)
