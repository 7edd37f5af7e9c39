"""Random requests against a core without a device, each checked against what it would get alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparsejax.engine.core import EngineCore
from sparsejax.engine.params import SamplingParams
from sparsejax.engine.prompts import Prompt
from sparsejax.errors import CapacityError
from tests.engine.fake import check_pages, expected, greedy, make_core


class Traffic:
    """`check` is asked of the core after each change."""

    def __init__(self, check: Callable[[EngineCore], None] = check_pages, **options: Any):
        self.core = make_core(**options)
        self.check = check
        self.wanted: dict[str, tuple[list[int], SamplingParams]] = {}
        self.num_finished = self.num_cached = 0

    def add(self, prompt: list[int], max_tokens: int, n: int, priority: int = 0, stop: bool = False, **more) -> None:
        params = greedy(max_tokens=max_tokens, ignore_eos=not stop, **more)
        if n > 1:
            params = dataclasses.replace(params, n=n, temperature=1.0)
        request_id = f"r{len(self.wanted)}"
        try:
            self.core.add(request_id, Prompt(None, prompt), params, priority)
        except CapacityError:
            size = self.core.scheduler.limits.page_size
            capacity = min(allocator.capacity for allocator in self.core.scheduler.allocators)
            assert len(prompt) + max_tokens > (capacity - 1) * size or params.sparsity
            return
        self.wanted[request_id] = (prompt, params)

    def step(self) -> None:
        for output in self.core.step():
            prompt, params = self.wanted[output.request_id]
            tokens = expected(prompt, params.max_tokens)
            if not params.ignore_eos and 0 in tokens:
                tokens = tokens[: tokens.index(0) + 1]
            for choice in output.outputs:
                assert choice.token_ids == tokens[: len(choice.token_ids)]
                if choice.finish_reason:
                    assert choice.token_ids == tokens
                    assert choice.finish_reason == ("stop" if tokens[-1] == 0 and not params.ignore_eos else "length")
            self.num_finished += output.finished
            self.num_cached += output.finished and output.num_cached_tokens
        self.check(self.core)

    def abort(self, index: int) -> None:
        live = self.core.request_ids()
        if live:
            (output,) = self.core.abort([live[index % len(live)]])
            assert output.finished
            self.check(self.core)

    def finish(self) -> None:
        for _ in range(5000):
            if not self.core.has_unfinished:
                break
            self.step()
        assert not self.core.has_unfinished
        assert all(allocator.num_live == 0 for allocator in self.core.scheduler.allocators)


class TrafficMachine(RuleBasedStateMachine):
    """Steps and aborts of `Traffic` with `options`; whoever inherits it says which requests there are."""

    options: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic(**self.options)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.traffic.step()

    @precondition(lambda self: self.traffic.core.request_ids())
    @rule(index=st.integers(0, 100))
    def abort(self, index):
        self.traffic.abort(index)

    @invariant()
    def all_is_well(self):
        self.traffic.check(self.traffic.core)

    def teardown(self):
        self.traffic.finish()
