"""What is compiled: a finite table, nothing after warm-up, every pool updated in place, every byte counted."""

from __future__ import annotations

import random

import jax
import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.config import EngineConfig
from sparsejax.engine.compile import Programs
from sparsejax.engine.table import StepTable
from tests.engine.in_place import assert_in_place, pool_copies
from tests.engine.models import EOS, VOCAB, random_prompts, tiny_engine, tiny_model


@pytest.fixture(scope="module")
def engine():
    # Long sequences, so that a pool is larger than any step's temporaries and a copy of one shows.
    with tiny_engine(tiny_model(positions=4096), warmup="full", num_decode_steps=3) as engine:
        yield engine


@pytest.fixture
def compiles():
    """Names of what JAX compiles while the test runs."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if "compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_compile_listener_hears_a_compile(compiles):
    jax.jit(lambda x: x * 3 + len(compiles))(1.0)
    assert compiles


def random_params(rng: random.Random) -> SamplingParams:
    params: dict = dict(max_tokens=rng.randint(1, 12), ignore_eos=rng.random() < 0.3)
    if rng.random() < 0.5:
        params["temperature"] = 0.0
    else:
        params |= dict(temperature=rng.uniform(0.1, 2), top_p=rng.uniform(0.1, 1), top_k=rng.choice([0, 5, 40]))
        params |= dict(seed=rng.randrange(99)) if rng.random() < 0.5 else {}
    extras = [
        dict(n=3, temperature=1.0),
        dict(logprobs=rng.randint(0, 20)),
        dict(prompt_logprobs=rng.randint(0, 20)),
        dict(presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.2),
        dict(logit_bias={3: 5.0, 4: -100.0}),
        dict(allowed_token_ids=[EOS, 11, 12, 13]),
        dict(min_tokens=1, stop_token_ids=[5, 6]),
        dict(min_p=0.1),
    ]
    for extra in extras:
        if rng.random() < 0.12:
            params |= extra
    return SamplingParams(**params)


def test_nothing_compiles_after_warm_up_over_500_random_mixes(engine, compiles):
    rng = random.Random(7)
    before, running, finished = engine.stats()["compiles"], set(), 0
    for mix in range(500):
        for index in range(rng.choice([0, 1, 1, 2, 3]) if len(running) < 14 else 0):
            name = f"{mix}.{index}"
            length = rng.choice([1, 2, 9, 30, 70, 200])
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, length))]
            engine.add_request(name, prompt, random_params(rng), priority=rng.randint(0, 1))
            running.add(name)
        if running and rng.random() < 0.1:
            name = rng.choice(sorted(running))
            engine.abort(name)
            running.discard(name)
        for _ in range(rng.randint(1, 4)):
            for output in engine.step():
                if output.finished:
                    running.discard(output.request_id)
                    finished += 1
    while engine.has_unfinished():
        finished += sum(output.finished for output in engine.step())
    assert engine.stats()["compiles"] == before
    assert not compiles
    assert finished > 200
    assert engine.stats()["kv_live_pages"] == 0


@pytest.mark.parametrize("seqs", [1, 4, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("tokens", [260, 512, 2048, 8192])
def test_the_table_is_small_and_serves_every_step(seqs, tokens):
    table = StepTable.build(seqs, tokens, EngineConfig.num_decode_steps)
    keys = list(table.keys())
    assert len(keys) == len(set(keys)) <= 24
    for greedy in (True, False):
        for rows in range(1, seqs + 1):
            for steps in (1, EngineConfig.num_decode_steps):
                assert table.decode(rows, steps, greedy) in keys
        for chunk in range(1, tokens - seqs + 1, 97):
            assert table.mixed(min(chunk, table.max_chunk), greedy, False) in keys
            assert table.mixed(min(chunk, table.max_chunk), greedy, True) in keys


def test_every_program_updates_the_state_in_place(engine):
    runner = engine.core.runner
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(runner.state.kv)) == runner.state.kv.group.pool_bytes
    assert len(runner.programs) == len(list(runner.table.keys())) + 4
    assert_in_place(engine)
    for key, program in runner.programs.items():
        assert program.memory_analysis().temp_size_in_bytes < runner.state.kv.group.layout.pool_bytes / 2, key


def test_a_program_that_copies_a_pool_is_caught():
    pool = jax.ShapeDtypeStruct((65, 2, 16, 16), "float32")

    def bad(pool, i):
        return pool.at[i].set(1.0), pool.sum(axis=(1, 2, 3))

    text = jax.jit(bad, donate_argnums=0).lower(pool, jax.ShapeDtypeStruct((), "int32")).compile().as_text()
    assert pool_copies(text, pool.shape)


def test_memory_is_what_is_allocated(engine):
    engine.generate(random_prompts(3, (5, 50)), SamplingParams(max_tokens=5))
    runner, memory = engine.core.runner, engine.memory()
    arrays = jax.tree.leaves((runner.state, runner.params))
    assert len({id(array) for array in arrays}) == len(arrays)
    assert memory["total"] == sum(array.nbytes for array in arrays)
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert memory["kv_pages"] == runner.state.kv.group.pool_bytes
    assert engine.stats()["kv_live_bytes"] == 0


def test_programs_compile_together_and_once():
    number, asked = jax.ShapeDtypeStruct((), "float32"), []

    def adding(amount: int):
        def build():
            asked.append(amount)
            return (lambda x: x + amount), (number,)

        return build

    programs, done = Programs(), []
    programs.get_all({"one": adding(1), "two": adding(2)}, lambda keys: done.extend(keys) or keys)
    assert done == ["one", "two"] and programs.num_compiles == 2 and programs.compile_seconds > 0
    programs.get_all({"one": adding(1), "three": adding(3)}, lambda keys: done.extend(keys) or keys)
    assert done[2:] == ["three"] and asked == [1, 2, 3] and programs.num_compiles == len(programs) == 3
    assert [float(programs.get(name, adding(0))(np.float32(4))) for name in ("one", "two", "three")] == [5, 6, 7]
    with pytest.raises(TypeError):
        programs.get("one", adding(1))(np.zeros(2, np.float32))


def test_page_tables_are_sent_as_a_copy(engine, monkeypatch):
    """A transfer may read its source after the call has returned, when the next plan is already being entered."""
    runner, sent = engine.core.runner, []
    monkeypatch.setattr(jax.numpy, "asarray", lambda array: sent.append(array) or jax.numpy.array(array))
    runner._send_tables()
    (tables,) = sent
    assert tables.any() and not np.shares_memory(tables, runner._table_mirror)
