"""The engine's heart: requests in, one step at a time, outputs out. `Engine` and `AsyncEngine` wrap it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sparsejax.cache.allocator import PageAllocator
from sparsejax.cache.prefix import PrefixCache
from sparsejax.engine.bad_words import BadWords, banned_next, compile_bad_words
from sparsejax.engine.detokenizer import Detokenizer, TextDecoder
from sparsejax.engine.grammar import Grammars
from sparsejax.engine.interrupt import deferred_interrupt
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.plan import StepPlan
from sparsejax.engine.policies import Policies
from sparsejax.engine.prompts import Prompt, check_length
from sparsejax.engine.reads import count_reads
from sparsejax.engine.request import RequestOutput
from sparsejax.engine.rows import mix_seed, pack_bias, pack_row
from sparsejax.engine.runner import Runner
from sparsejax.engine.scheduler import Limits, Scheduler
from sparsejax.engine.sequence import Sequence
from sparsejax.engine.tiers import PageTiers
from sparsejax.engine.timings import Timings
from sparsejax.engine.tracker import Choice, Tracker, needs_full_sampler
from sparsejax.engine.validate import reject
from sparsejax.errors import CapacityError, RequestError
from sparsejax.sparsity.eviction import Eviction
from sparsejax.sparsity.kinds import ALL
from sparsejax.sparsity.policy import SparsityConfig

logger = logging.getLogger(__name__)


@dataclass
class _InFlight:
    """A dispatched step whose results are still on the device."""

    plan: StepPlan
    outputs: Any
    started: float


class EngineCore:
    """Joins the scheduler's decisions with the runner's programs, one step ahead of the results.

    While the device computes step n, the host plans and dispatches step n + 1 and then reads the results of n.
    A sequence that ends in step n may thus take part in n + 1; what that computes for it is dropped.
    """

    def __init__(
        self,
        runner: Runner,
        allocators: tuple[PageAllocator, ...],
        limits: Limits,
        *,
        max_model_len: int,
        eos_ids: tuple[int, ...],
        tokenizer: Any,
        seed: int,
        policies: Policies,
        cache: PrefixCache,
        prefix_caching: bool = True,
        cache_outputs: bool = False,
        tiers: PageTiers | None = None,
    ):
        self.runner = runner
        self.tiers = tiers
        if tiers is not None:
            cache.on_evict = tiers.write_back
        self.scheduler = Scheduler(limits, allocators, cache, tiers)
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer
        self._text = None if tokenizer is None else TextDecoder(tokenizer)
        self.counters: Counter[str] = Counter()
        self.timings = Timings()
        self._eos_ids = eos_ids
        self._seed = seed
        self._policies = policies
        self._prefix_caching, self._cache_outputs = prefix_caching, cache_outputs
        self._grammars = Grammars(tokenizer, runner.vocab_size, eos_ids)
        self._arrivals = 0
        self._trackers: dict[str, Tracker] = {}
        self._owner: dict[Sequence, tuple[Tracker, Choice]] = {}
        self._forks: dict[Sequence, list[Sequence]] = {}
        self._bad_words: dict[Sequence, BadWords] = {}
        self._in_flight: _InFlight | None = None
        self._last_read = 0.0
        self._undelivered: list[RequestOutput] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._trackers or self._undelivered)

    def request_ids(self) -> list[str]:
        return list(self._trackers)

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> None:
        """Queues a request.

        Raises:
            RequestError: the id is taken, or the request does not fit the model or its limits.
            CapacityError: it needs more pages than the pool has.
        """
        self.check(prompt, params)
        prompt, params, past = self.scheduler.conversations.continued(prompt, params)
        if request_id in self._trackers:
            raise RequestError(
                f"request_id {request_id!r} is in use: wait until it finishes, or choose another.",
                parameter="request_id",
                value=request_id,
            )
        max_tokens = self._room(prompt, params)
        tracker = Tracker(
            request_id, prompt.text, prompt.token_ids, params, params.all_stop_ids(self._eos_ids),
            frozenset(self._eos_ids), self._token_text, compress_at=prompt.num_compressed,
        )  # fmt: skip
        self._arrivals += 1
        bad_words = self._compile_bad_words(params)
        policy = self._policies.of(params, len(prompt.token_ids))
        eviction = self._policies.eviction(params, prompt.num_compressed)
        # Every prompt token's logits are wanted where prompt_logprobs are: nothing of it may be skipped.
        skippable = 0 if params.prompt_logprobs is not None else policy.keep.skippable(prompt.num_compressed)
        root = self.scheduler.prefixes.cache.root(params.cache_salt) if self._prefix_caching else None
        rule = params.structured_outputs
        seed = params.seed if params.seed is not None else mix_seed(self._seed, self._arrivals)
        for index in range(params.n):
            sequence = Sequence(
                list(prompt.token_ids), max_tokens, (priority, self._arrivals, index),
                needs_history=bad_words.needs_history or rule is not None or self._must_not_overrun(params, eviction),
                eviction=eviction,
                num_groups=len(self.scheduler.allocators), root=root, most_cached=skippable,
                shares_outputs=self._cache_outputs and policy.kind is ALL,
            )  # fmt: skip
            choice = Choice(
                index,
                sequence,
                Detokenizer(self._text, prompt.token_ids, params),
                mix_seed(seed, index),
                constraint=None if rule is None else self._grammars.constraint(rule),
            )
            if root is not None and past is None and params.prompt_logprobs is None:
                sequence.cut_names = self._cut_names(sequence, policy)
            tracker.choices.append(choice)
            self._owner[sequence] = (tracker, choice)
            self._bad_words[sequence] = bad_words
        self._trackers[request_id] = tracker
        first, *rest = (choice.sequence for choice in tracker.choices)
        if past is not None:
            self.scheduler.resume(past, first)
        self.scheduler.add(first)
        if eviction is not None:  # each sample observes its own queries, so each computes the prompt
            for sequence in rest:
                self.scheduler.add(sequence)
        elif rest:
            self._forks[first] = rest
        self.counters["requests"] += 1
        self.counters["prompt_tokens"] += len(prompt.token_ids)

    def policy_of(self, params: SamplingParams, num_prompt: int) -> SparsityConfig:
        """The policy under which a request with so many prompt tokens runs, with the model's own filter layers."""
        return self._policies.of(params, num_prompt)

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises what `add` would raise for this prompt and these parameters, and queues nothing."""
        params.check_model(self.runner.vocab_size, self._eos_ids, self.max_model_len)
        if params.keep_alive is not None and not self.scheduler.conversations.max_pages:
            reject("keep_alive", params.keep_alive, "None where conversation_pages=0", "Start the engine with more.")
        prompt, params, _ = self.scheduler.conversations.continued(prompt, params)
        self._policies.of(params, len(prompt.token_ids))
        self._compile_bad_words(params)
        if params.structured_outputs is not None:
            self._grammars.compile(params.structured_outputs)
        total = len(prompt.token_ids) + self._room(prompt, params)
        size, allocators = self.scheduler.limits.page_size, self.scheduler.allocators
        eviction = self._policies.eviction(params, prompt.num_compressed)
        peaks = eviction.peak_pages(total, size) if eviction else (-(-total // size),) * len(allocators)
        for pages, allocator in zip(peaks, allocators, strict=True):
            if pages > allocator.capacity:
                raise CapacityError(
                    f"the request may reach {total} tokens = {pages} pages of {size}, but the KV pool has "
                    f"{allocator.capacity}: lower max_tokens, shorten the prompt, or raise kv_memory_bytes."
                )

    def extended(self, prompt: Prompt, params: SamplingParams) -> Prompt:
        """The tokens of a request's prompt, which of a conversation are those that were said.

        Raises:
            ConversationError: it is gone, another request continues it, or the prompt is none of its next turns.
        """
        if params.conversation is None:
            return prompt
        return self.scheduler.conversations.of(params).extended_by(prompt, self.tokenizer)

    def _cut_names(self, sequence: Sequence, policy: SparsityConfig) -> list[bytes]:
        """Names of the pages that an eviction inside the prompt leaves, if it is the only one and leaves full pages."""
        eviction, size = sequence.eviction, self.scheduler.limits.page_size
        if eviction is None or eviction.interval or eviction.at >= sequence.num_prompt or eviction.kept[0] % size:
            return []
        tokens, rule = sequence.tokens[: eviction.at], repr((policy.keep, eviction))
        return self.scheduler.prefixes.cache.names(sequence.root, tokens, rule, eviction.kept[0] // size)

    def _must_not_overrun(self, params: SamplingParams, eviction: Eviction | None) -> bool:
        """Whether what a step computes after a sequence's end would spoil the state that is kept of it: another
        eviction, a page sealed. Then the host waits for each token before the next."""
        if params.keep_alive is None or eviction is None:
            return False
        return eviction.interval is not None or self.scheduler.limits.share_whole_pages

    def _keep(self, tracker: Tracker, choice: Choice) -> None:
        """Keeps the state of a sequence that has ended for the next turn, if its request asks for that."""
        sequence, params, conversations = choice.sequence, tracker.params, self.scheduler.conversations
        ended = choice.finish_reason in ("stop", "length")
        if not ended or params.keep_alive is None:
            conversations.leave(sequence, ended)
            return
        apart = self.scheduler.limits.share_whole_pages or sequence.evict_at is not None
        row = self.runner.save_row(sequence.row) if sequence.eviction and apart and self.runner.rows_hold else None
        counted = self._policies.of(params, tracker.compress_at).keep.observes == "all"
        facts = dict(text=tracker.prompt, compress_at=tracker.compress_at, counted=counted)
        tracker.conversation = conversations.keep(sequence, params, row, **facts)

    def _room(self, prompt: Prompt, params: SamplingParams) -> int:
        """How many tokens the request may generate; without ``max_tokens`` what the pool can hold ends it too."""
        room = check_length(len(prompt.token_ids), params, self.max_model_len)
        if params.max_tokens is not None:
            return room
        pages = min(allocator.capacity for allocator in self.scheduler.allocators)
        pool = pages * self.scheduler.limits.page_size
        return max(min(room, pool - len(prompt.token_ids)), 1)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """Ends requests in any state and returns their last outputs; unknown ids are ignored."""
        outputs = []
        for request_id in request_ids:
            tracker = self._trackers.get(request_id)
            if tracker is None:
                continue
            for choice in tracker.choices:
                if choice.finish_reason is None:
                    self._end(tracker, choice, "abort")
            self.counters["aborted"] += 1
            outputs += self._report([tracker])
        return outputs

    def step(self) -> list[RequestOutput]:
        """Dispatches the next step, then takes in the results of the one before.

        Raises:
            KeyboardInterrupt: Ctrl-C came meanwhile; the outputs of this step are kept for the next call.
        """
        with deferred_interrupt() as check:
            self._undelivered += self._advance()
            check()
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def put_back(self, outputs: Iterable[RequestOutput]) -> None:
        """Keeps outputs that belong to somebody else for their next call of `step`."""
        self._undelivered += outputs

    def _advance(self) -> list[RequestOutput]:
        plan = self.scheduler.schedule()
        if plan is None and self._in_flight is None and self.scheduler.restores:
            self.scheduler.restores.wait()
        started = self._dispatch(plan) if plan else None
        finished, self._in_flight = self._in_flight, started
        return self._collect(finished) if finished else []

    def drain(self) -> None:
        """Waits for what is still on the device and drops it."""
        if self._in_flight:
            jax.block_until_ready(self._in_flight.outputs)
            self._in_flight = None

    def close(self) -> None:
        """Ends every request and leaves cached pages on the disk, where there is one; what a failed device holds of
        them is lost."""
        self.abort(self.request_ids())
        try:
            self.drain()
        except RuntimeError as error:  # of JAX: the step failed on the device
            logger.warning("the last step failed: %s", error)
            self._in_flight = None
        if self.tiers is not None:
            self.scheduler.conversations.close()
            self.tiers.close([(cached.hash, cached.page) for cached in self.scheduler.prefixes.cache])

    def _dispatch(self, plan: StepPlan) -> _InFlight | None:
        now = time.monotonic()
        for sequence in plan.admitted:
            tracker, choice = self._owner[sequence]
            if tracker.metrics.first_scheduled_time is None:
                tracker.metrics.first_scheduled_time = now
                tracker.num_cached_tokens = sequence.num_cached
                if sequence.past is not None:
                    self.counters["continued_tokens"] += sequence.num_cached
                elif sequence.root is not None:
                    self.counters["prefix_cache_queries"] += sequence.num_prompt
                    self.counters["prefix_cache_hits"] += sequence.num_cached
                self.timings.queue.add(now - tracker.metrics.arrival_time)
            policy = self._policies.pack(tracker.params, sequence.num_prompt)
            keep = self._policies.pack_keep(tracker.params, sequence.num_prompt, sequence.eviction)
            self.runner.admit(sequence.row, self._row_values(sequence, tracker, choice), policy, keep)
            if sequence.saved_row is not None:
                self.runner.load_row(sequence.row, sequence.saved_row)
                sequence.saved_row = None
        self._restrict([sequence for sequence, _ in plan.outputs if sequence.needs_history])
        greedy = not any(
            needs_full_sampler(tracker.params, bool(tracker.stop_ids))
            for tracker, _ in (self._owner[sequence] for sequence, _ in plan.outputs)
        )
        prompt_logprobs = any(
            chunk.start < chunk.sequence.num_prompt and self._wants_prompt_logprobs(chunk.sequence)
            for chunk in plan.chunks
        )
        if not plan.num_tokens:
            self.runner.cut_caches(plan)
            return None
        started = time.perf_counter()
        outputs = self.runner.dispatch(plan, greedy, prompt_logprobs)
        for chunk in plan.chunks:
            self._fork(chunk.sequence)
        for sequence in plan.decode:
            self._fork(sequence)
        self.counters["steps"] += 1
        self.counters["passes"] += plan.num_steps
        self.counters["computed_tokens"] += plan.num_tokens
        self.timings.step_tokens.add(plan.num_tokens)
        queries = len(plan.decode) * plan.num_steps
        self.counters["decode_tiles_dense"] += self.runner.decode_tiles(plan, evicted=True)
        self.counters["decode_queries_dense"] += queries
        if self._policies.selector is None:
            tiles = self.runner.decode_tiles(plan)
            self.counters["decode_queries"] += queries
            self.counters["decode_tiles_held"] += tiles
            self.counters["decode_tiles_read"] += tiles
        return _InFlight(plan, outputs, started)

    def _row_values(self, sequence: Sequence, tracker: Tracker, choice: Choice) -> dict:
        return pack_row(
            tracker.params, tracker.prompt_ids, choice.token_ids, self.runner.vocab_size, self._eos_ids, choice.seed,
            never=self._bad_words[sequence].never,
        )  # fmt: skip

    def _restrict(self, sequences: list[Sequence]) -> None:
        """Sets what may come next where that depends on what came: the host knows every earlier token of these rows."""
        masks: dict[int, np.ndarray] = {}
        for sequence in sequences:
            tracker, choice = self._owner[sequence]
            if choice.constraint is not None:
                masks[sequence.row] = choice.constraint.mask
            if self._bad_words[sequence].needs_history:
                banned = banned_next(self._bad_words[sequence], choice.token_ids)
                self.runner.set_bias(sequence.row, *pack_bias(tracker.params, banned))
        if masks:
            self.runner.set_allowed(masks)

    def _compile_bad_words(self, params: SamplingParams) -> BadWords:
        return compile_bad_words(params.bad_words or (), self.tokenizer, len(params.logit_bias or ()))

    def _wants_prompt_logprobs(self, sequence: Sequence) -> bool:
        tracker, choice = self._owner[sequence]
        return tracker.params.prompt_logprobs is not None and choice.index == 0

    def _fork(self, sequence: Sequence) -> None:
        """Once a prompt is computed, its other samples start from its pages."""
        if sequence in self._forks and sequence.num_computed >= sequence.num_prompt:
            children = [child for child in self._forks.pop(sequence) if child in self._owner]
            self.scheduler.fork(sequence, children)

    def _collect(self, step: _InFlight) -> list[RequestOutput]:
        results = self.runner.read(step.outputs)
        if self.tiers is not None:
            self._note_cost(step)
        if results.reads is not None:
            count_reads(results.reads, self.counters)
        touched: dict[Tracker, None] = {}
        if results.prompt is not None:
            self._collect_prompt(step.plan, results.prompt)
        for slot, (sequence, at) in enumerate(step.plan.outputs):
            if sequence not in self._owner:
                continue  # it ended while this step was on its way
            tracker, choice = self._owner[sequence]
            touched[tracker] = None
            before = len(choice.token_ids)
            for i in range(step.plan.num_steps):
                record = results.sampled[i, slot]
                sequence.resolve(at + i, int(record[0]))
                if tracker.push(choice, record):
                    self._forget(tracker, choice)
                    break
            self._note_tokens(tracker, choice, len(choice.token_ids) - before)
        return self._report(touched)

    def _note_cost(self, step: _InFlight) -> None:
        """What a page of prompt took to compute: steps overlap, so a step's time begins where the last one's ended."""
        now = time.perf_counter()
        if step.plan.chunks:
            pages = step.plan.num_tokens / self.scheduler.limits.page_size
            self.tiers.costs.note("compute", now - max(step.started, self._last_read), pages)
        self._last_read = now

    def _note_tokens(self, tracker: Tracker, choice: Choice, count: int) -> None:
        """Counts the tokens that a step brought for an output, and when they came."""
        now = time.monotonic()
        self.counters["generation_tokens"] += count
        if choice.last_token_time is not None:
            self.timings.inter_token.add((now - choice.last_token_time) / count, count)
        elif choice.index == 0:
            self.timings.first_token.add(now - tracker.metrics.arrival_time)
        choice.last_token_time = now

    def _collect_prompt(self, plan: StepPlan, records: Any) -> None:
        start = 0
        for chunk in plan.chunks:
            if chunk.sequence in self._owner and self._wants_prompt_logprobs(chunk.sequence):
                tracker, _ = self._owner[chunk.sequence]
                if chunk.start < chunk.sequence.num_prompt:
                    tracker.push_prompt(chunk.start, records[start : start + chunk.count])
            start += chunk.count

    def _end(self, tracker: Tracker, choice: Choice, reason: str) -> None:
        tracker.end(choice, reason)
        self._forget(tracker, choice)

    def _forget(self, tracker: Tracker, choice: Choice) -> None:
        sequence = choice.sequence
        self._keep(tracker, choice)
        self.scheduler.finish(sequence)
        self._forks.pop(sequence, None)
        del self._owner[sequence]
        del self._bad_words[sequence]

    def _report(self, trackers: Iterable[Tracker]) -> list[RequestOutput]:
        outputs = []
        for tracker in trackers:
            if tracker.finished and self._trackers.pop(tracker.request_id, None) is not None:
                generated = [len(choice.token_ids) for choice in tracker.choices]
                reasons = [choice.finish_reason or "" for choice in tracker.choices]
                self.timings.end(tracker.metrics, len(tracker.prompt_ids), generated, reasons)
            output = tracker.output()
            if output is not None:
                outputs.append(output)
        return outputs

    def _token_text(self, token: int) -> str | None:
        return None if self._text is None else self._text.token_text(token)
