"""Whatever ends a request early, and in whatever state it is, its pages come back and the engine serves on."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from sparsejax import SamplingParams
from tests.engine.models import random_prompts, tiny_engine

PROMPTS = random_prompts(1, (3, 30, 200, 9, 60, 5, 12, 80, 33, 14, 21, 2))
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    with tiny_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(engine):
    return [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)]


@pytest.fixture
def sigint():
    """Ctrl-C raises, also where the tests were started in the background and so ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def served(engine, wanted):
    """The engine gives every page back and still answers right."""
    assert not engine.has_unfinished()
    assert engine.stats()["kv_live_pages"] == 0
    assert [output.outputs[0].token_ids for output in engine.generate(PROMPTS, GREEDY)] == wanted


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 6, 9, 14, 23])
def test_abort_in_every_state(engine, wanted, steps):
    """Waiting, half prefilled, in flight, decoding, about to fork, forked: after `steps` steps all are there."""
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(f"{index}", prompt, GREEDY)
    engine.add_request("n", PROMPTS[4], SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True))
    for _ in range(steps):
        engine.step()
    outputs = engine.abort([str(index) for index in range(0, len(PROMPTS), 2)] + ["n", "unknown"])
    assert all(choice.finish_reason == "abort" for output in outputs for choice in output.outputs)
    finished = {}
    while engine.has_unfinished():
        for output in engine.step():
            finished[output.request_id] = output.outputs[0].token_ids
    for index in range(1, len(PROMPTS), 2):
        assert finished.get(str(index), wanted[index]) == wanted[index]
    served(engine, wanted)


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.02])
def test_ctrl_c_leaves_a_usable_engine(engine, wanted, sigint, delay):
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        for _ in range(1000):
            engine.generate(PROMPTS, GREEDY)
    timer.join()
    served(engine, wanted)


def test_ctrl_c_inside_a_step_loses_no_token(engine, wanted, sigint, monkeypatch):
    """A caller of step() who catches Ctrl-C and goes on has every token of every request."""
    delta = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, output_kind="delta")
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(f"{index}", prompt, delta)
    got: dict[str, list[int]] = {str(index): [] for index in range(len(PROMPTS))}
    schedule, calls = engine.core.scheduler.schedule, 0

    def interrupted():
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            signal.raise_signal(signal.SIGINT)
        return schedule()

    monkeypatch.setattr(engine.core.scheduler, "schedule", interrupted)
    interrupts = 0
    while engine.has_unfinished():
        try:
            for output in engine.step():
                for choice in output.outputs:
                    got[output.request_id] += choice.token_ids
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == calls // 3 > 5
    assert list(got.values()) == wanted


def test_an_error_in_the_callers_loop_frees_the_stream(engine, wanted):
    def consume():
        for _ in engine.stream(PROMPTS[2], GREEDY):
            raise ValueError("the caller's")

    with pytest.raises(ValueError, match="the caller's"):
        consume()
    served(engine, wanted)
