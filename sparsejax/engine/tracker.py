"""A request while it lives: its sequences, their text so far, and the outputs that callers see."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsejax.engine.detokenizer import Detokenizer
from sparsejax.engine.grammar import Constraint
from sparsejax.engine.request import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from sparsejax.engine.sequence import Sequence


@dataclass(eq=False)
class Choice:
    """One of a request's n outputs.

    Attributes:
        constraint: what its text must follow, or None.
        last_token_time: when its newest token came, in seconds of ``time.monotonic``, or None.
        reported: tokens and characters already handed out, for DELTA outputs.
        closed: its end has been handed out too.
    """

    index: int
    sequence: Sequence
    detokenizer: Detokenizer
    seed: int
    constraint: Constraint | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    last_token_time: float | None = None
    reported: tuple[int, int] = (0, 0)
    closed: bool = False


@dataclass(eq=False)
class Tracker:
    """One request from arrival to its last output.

    Attributes:
        prompt_ids: its prompt; every output carries this list itself, not a copy.
        compress_at: tokens of the prompt after which its policy compresses the cache.
        conversation: under which its answer was kept, once it was.
        stop_ids: token ids that end an output; those in `eos_ids` are the model's own.
    """

    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: tuple[int, ...]
    eos_ids: frozenset[int]
    decode_token: Callable[[int], str | None]
    compress_at: int = 0
    choices: list[Choice] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.monotonic()))
    num_cached_tokens: int = 0
    conversation: str | None = None

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def push(self, choice: Choice, record: np.ndarray) -> bool:
        """Takes one sampled token (an int32 row of a step's results). True if the choice ends with it."""
        token, logprob = int(record[0]), _float(record[1])
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = time.monotonic()
        choice.token_ids.append(token)
        choice.cumulative_logprob += logprob
        if self.params.logprobs is not None:
            choice.logprobs.append(self._alternatives(record, self.params.logprobs))
        self._advance(choice, token)
        return choice.finish_reason is not None

    def _advance(self, choice: Choice, token: int) -> None:
        params = self.params
        if token in self.stop_ids:
            if params.include_stop_str_in_output:
                choice.text += choice.detokenizer.push([token])
            self.end(choice, "stop", None if token in self.eos_ids else token)
            return
        choice.text += choice.detokenizer.push([token])
        if choice.constraint is not None:
            choice.constraint.accept(token)
        if choice.detokenizer.stopped is not None:
            self.end(choice, "stop", choice.detokenizer.stopped)
        elif choice.constraint is not None and choice.constraint.ended:
            self.end(choice, "error" if choice.constraint.broken else "stop")
        elif len(choice.token_ids) >= choice.sequence.max_tokens:
            self.end(choice, "length")

    def end(self, choice: Choice, reason: str, stop_reason: int | str | None = None) -> None:
        """Closes a choice; text that was held back for a stop string comes out."""
        choice.text += choice.detokenizer.finish()
        stopped = choice.detokenizer.stopped
        if reason == "length" and stopped is not None:  # the held-back text completed a stop string
            reason, stop_reason = "stop", stopped
        choice.finish_reason, choice.stop_reason = reason, stop_reason
        if self.finished:
            self.metrics.finished_time = time.monotonic()

    def push_prompt(self, start: int, records: np.ndarray) -> None:
        """Takes the log-probabilities of prompt tokens ``start + 1 ..``, an int32 row each."""
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(None)
        del self.prompt_logprobs[start + 1 :]  # computed again after a preemption
        for record in records[: len(self.prompt_ids) - start - 1]:
            self.prompt_logprobs.append(self._alternatives(record, self.params.prompt_logprobs))

    def output(self) -> RequestOutput | None:
        """What the caller is told now, by the request's `output_kind`; None if there is nothing to tell."""
        kind = self.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not self.finished:
            return None
        delta = kind is RequestOutputKind.DELTA
        choices = [choice for choice in self.choices if not (delta and choice.closed)]
        outputs = [self._completion(choice, delta) for choice in choices]
        if delta:
            outputs = [out for out in outputs if out.text or out.token_ids or out.finish_reason]
            if not outputs:
                return None
        logprobs = None if self.params.prompt_logprobs is None else list(self.prompt_logprobs) or [None]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=logprobs,
            outputs=outputs,
            finished=self.finished,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            conversation=self.conversation,
        )

    def _completion(self, choice: Choice, delta: bool) -> CompletionOutput:
        tokens, characters = choice.reported if delta else (0, 0)
        choice.reported = (len(choice.token_ids), len(choice.text))
        choice.closed = choice.finish_reason is not None
        return CompletionOutput(
            index=choice.index,
            text=choice.text[characters:],
            token_ids=choice.token_ids[tokens:],
            cumulative_logprob=choice.cumulative_logprob,
            logprobs=None if self.params.logprobs is None else choice.logprobs[tokens:],
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _alternatives(self, record: np.ndarray, count: int) -> dict[int, Logprob]:
        """The chosen token first, then the `count` best ones."""
        token = int(record[0])
        if len(record) == 2:  # the greedy sampler: the chosen token is the best one
            return {token: Logprob(_float(record[1]), 1, self.decode_token(token))}
        best = (len(record) - 3) // 2
        entries = {token: Logprob(_float(record[1]), int(record[2]), self.decode_token(token))}
        values = record[3 + best :].view(np.float32)
        for place in range(count):
            other = int(record[3 + place])
            entries.setdefault(other, Logprob(float(values[place]), place + 1, self.decode_token(other)))
        return entries


def _float(bits: Any) -> float:
    return float(np.int32(bits).view(np.float32))


def needs_full_sampler(params: SamplingParams, has_stop_ids: bool) -> bool:
    """Whether a request asks for more than the arg max and its log-probability."""
    return bool(
        not params.greedy
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.logit_bias
        or params.bad_words
        or params.allowed_token_ids
        or params.structured_outputs
        or (params.min_tokens and has_stop_ids)
        or (params.logprobs or 0) > 0
    )
