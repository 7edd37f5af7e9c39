"""Eviction in the engine: the same tokens however a request is chunked, batched or preempted, and pages that leave."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.errors import ConfigError, RequestError
from sparsejax.models.decoder import Decoder
from sparsejax.sparsity.eviction import Eviction, Keep
from sparsejax.sparsity.policy import PRESETS, SparsityConfig
from tests.engine.in_place import assert_in_place
from tests.engine.models import random_prompts, tiny_engine, tiny_model

PROMPTS = random_prompts(6, (70, 150, 3, 230, 90))
KEEPS = [name for name, preset in PRESETS.items() if preset.keep.method != "all" and preset.keep.beta == 1]
SMALL = {"budget": 40, "sink": 3, "recent": 12, "window": 12, "pool": 3, "interval": 17}
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


def preset(name: str, **changed) -> dict:
    return {"preset": name, **SMALL, **changed}


def newest(view):
    """A score of one's own."""
    return jnp.arange(view.page_ids.shape[0] * view.page_size, dtype=jnp.float32)[None]


QUEST = {"preset": "quest", "budget": 48, "recent": 16}
BOTH = SparsityConfig(keep=Keep("keydiff", **{**SMALL, "budget": 100}), select="quest", budget=48, recent=16)
OWN = SparsityConfig(keep=Keep.scored(newest, **SMALL))
DECLARED = ["dense", *map(preset, KEEPS), QUEST, BOTH, OWN, preset("h2o", budget=300)]
LIGHT = [name for name in KEEPS if name != "h2o"]  # its programs take longest to compile


def asking(name: str, **changed) -> SamplingParams:
    return dataclasses.replace(GREEDY, sparsity=preset(name, **changed))


def tokens(outputs):
    return [[choice.token_ids for choice in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def engine():
    with tiny_engine(sparsity=DECLARED, max_num_seqs=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(engine):
    return {name: [tokens(engine.generate(p, asking(name)))[0] for p in PROMPTS] for name in KEEPS}


def test_evicting_changes_tokens_and_differs_by_method(engine, alone):
    dense = tokens(engine.generate(PROMPTS, GREEDY))
    answers = {name: str(alone[name][3]) for name in KEEPS}
    assert len(set(answers.values())) == len(KEEPS)
    assert all(alone[name][3] != dense[3] for name in KEEPS)
    # The first token is sampled from the whole prompt, and a prompt within the budget keeps everything.
    assert all(alone[name][3][0][0] == dense[3][0][0] for name in KEEPS if name != "streaming")
    assert all(alone[name][2] == dense[2] for name in KEEPS)


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(engine, alone):
    mixed = dataclasses.replace(GREEDY, sparsity=QUEST)
    wanted = [tokens(engine.generate(p, mixed))[0] for p in PROMPTS]
    before = engine.stats()["compiles"]
    requests = [(p, asking(name)) for name in KEEPS for p in PROMPTS] + [(p, mixed) for p in PROMPTS]
    outputs = engine.generate([p for p, _ in requests], [params for _, params in requests])
    assert tokens(outputs) == [answer for name in KEEPS for answer in alone[name]] + wanted
    assert engine.stats()["compiles"] == before
    assert engine.stats()["kv_live_pages"] == 0


@pytest.fixture(scope="module")
def later(engine):
    """Prompts of which a head is compressed, and their answers."""
    prompts = [{"prompt_token_ids": PROMPTS[3], "compress_at": at} for at in (229, 180, 90, 230)]
    return prompts, tokens(engine.generate(prompts, asking("snapkv")))


def test_a_question_that_comes_later_reads_the_compressed_prompt(later, alone):
    _, answers = later
    assert answers[3] == alone["snapkv"][3]
    assert len({str(answer) for answer in answers}) == 4


@pytest.mark.parametrize(
    "names,settings",
    [
        (LIGHT, dict(max_num_seqs=4, max_num_batched_tokens=20, num_decode_steps=5)),
        pytest.param(KEEPS, dict(max_num_batched_tokens=16), marks=pytest.mark.slow),
        pytest.param(KEEPS, dict(max_num_batched_tokens=512), marks=pytest.mark.slow),
        pytest.param(KEEPS, dict(max_num_seqs=3, max_num_batched_tokens=20, page_size=64), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_chunks_and_pages_do_not_change_tokens(alone, later, names, settings):
    with tiny_engine(sparsity=["dense", *map(preset, names)], **settings) as other:
        for name in names:
            if "page_size" in settings and name == "random_keep":
                continue  # which numbers it draws depends on the number of slots
            assert tokens(other.generate(PROMPTS, asking(name))) == alone[name], name
        prompts, answers = later
        assert tokens(other.generate(prompts, asking("snapkv"))) == answers


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", KEEPS)
def test_what_follows_the_compressed_part_of_a_prompt_is_read_as_decoding_would(engine, alone, name, count):
    """A continuation given with the prompt is answered as if it had been generated: no eviction saw it."""
    head, answer = PROMPTS[3], alone[name][3][0]
    prompt = {"prompt_token_ids": head + answer[:count], "compress_at": len(head)}
    rest = dataclasses.replace(asking(name), max_tokens=len(answer) - count)
    assert tokens(engine.generate(prompt, rest)) == [[answer[count:]]]
    del prompt["compress_at"]
    if name not in ("rkv", "streaming"):  # those cut again as they go, wherever prompts end
        assert tokens(engine.generate(prompt, rest)) != [[answer[count:]]]


def test_preempted_equals_uninterrupted(engine, alone):
    growing, long = random_prompts(7, (9,) * 3), dataclasses.replace(GREEDY, max_tokens=90)
    wanted = tokens(engine.generate(growing, long))
    allocator = engine.core.scheduler.allocator
    taken = allocator.allocate(allocator.num_free - 20)
    try:
        for name in KEEPS:
            before = engine.stats()["num_preemptions"]
            params = [long] * len(growing) + [asking(name)] * len(PROMPTS)
            assert tokens(engine.generate([*growing, *PROMPTS], params)) == [*wanted, *alone[name]], name
            assert engine.stats()["num_preemptions"] > before
    finally:
        allocator.release(taken)
    assert engine.stats()["kv_live_pages"] == 0


def test_samples_of_one_request_and_aborts(engine):
    params = dataclasses.replace(asking("snapkv"), temperature=0.9, seed=3, n=3)
    together = tokens(engine.generate(PROMPTS[1], params))[0]
    assert len({tuple(choice) for choice in together}) == 3
    assert together[0] == tokens(engine.generate(PROMPTS[1], dataclasses.replace(params, n=1)))[0][0]
    for index in range(6):
        engine.add_request(f"r{index}", PROMPTS[3], asking("rkv"))
    for _ in range(12):
        engine.step()
    engine.abort([f"r{index}" for index in range(6)])
    while engine.has_unfinished():
        engine.step()
    assert engine.stats()["kv_live_pages"] == 0


def test_pages_leave_at_once_and_the_counters_say_so(engine):
    engine.generate(PROMPTS[2], GREEDY)  # collects what earlier requests left on its way
    before = engine.stats()
    engine.add_request("r", PROMPTS[3], asking("snapkv"))
    most = 0
    while engine.stats()["num_running"] or engine.stats()["num_waiting"]:
        engine.step()
        held = engine.stats()["kv_live_pages"]
        most = max(most, held)
        (sequence,) = engine.core.scheduler.running or [None]
        if sequence is not None and sequence.num_computed > 231:
            assert held == -(-(sequence.num_computed - 230 + 40) // 16) == len(sequence.pages)
    while engine.has_unfinished():
        engine.step()
    assert most == -(-230 // 16)
    after = engine.stats()
    held, dense = (after[name] - before[name] for name in ("decode_held_bytes", "decode_dense_bytes"))
    steps, page = range(1, 40), engine.stats()["kv_page_bytes"]
    assert held == page * sum(-(-(40 + step) // 16) for step in steps)
    assert dense == page * sum(-(-(230 + step) // 16) for step in steps)


def test_pools_bounds_and_observed_queries_are_updated_in_place(engine):
    assert_in_place(engine)
    memory = engine.memory()
    queries, mass = 5 * 12 * 4 * 16, engine.core.runner.state.kv.group.layout.num_pages * 2 * 16
    assert memory["observed_attention"] == 2 * 4 * (queries + mass)
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")


def test_eviction_and_selection_compose(engine, alone):
    before = engine.stats()
    engine.generate(PROMPTS[3], dataclasses.replace(GREEDY, sparsity=BOTH))
    read, held, dense = (
        engine.stats()[f"decode_{name}_bytes"] - before[f"decode_{name}_bytes"] for name in ("read", "held", "dense")
    )
    assert read < held < dense


def test_a_score_of_ones_own(engine, alone):
    """The newest tokens: what `streaming` keeps, where it cuts but once."""
    answer = tokens(engine.generate(PROMPTS[3], dataclasses.replace(GREEDY, sparsity=OWN)))[0]
    assert all(answer != alone[name][3] for name in KEEPS)
    once = asking("streaming", interval=230 - 40)
    assert tokens(engine.generate(PROMPTS[3], once))[0] == answer


class Batch(NamedTuple):
    tokens: jax.Array
    positions: jax.Array


class SinksAndWindow:
    """A KV object without state: each token sees sinks and what came since the window's start at the last cut."""

    def __init__(self, keep: Keep):
        self.keep = keep

    def attend(self, layer, q, k, v, batch, rotate):
        q, k, position = rotate(q), rotate(k), batch.positions
        kept, interval, sink = self.keep.kept(0), self.keep.interval, self.keep.sink
        cut = kept + (position - kept) // interval * interval
        start = jnp.where(position >= kept + interval, cut - (kept - sink), 0)
        seen = (position[None] <= position[:, None]) & ((position[None] >= start[:, None]) | (position[None] < sink))
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        scores = jnp.where(seen, jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5, -jnp.inf)
        return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v), self


def test_streaming_is_sinks_and_a_window_in_a_plain_forward_pass(engine, alone):
    keep = Keep("streaming", **SMALL)
    model = tiny_model()
    decoder = Decoder(model.config, jnp.float32)

    @jax.jit
    def following(ids):
        hidden, _ = decoder.apply({"params": model.params}, Batch(ids, jnp.arange(len(ids))), SinksAndWindow(keep))
        return decoder.apply({"params": model.params}, hidden, method="logits").argmax(-1)

    for prompt, (answer,) in zip(PROMPTS, alone["streaming"], strict=True):
        ids = jnp.asarray((prompt + answer + [0] * 300)[:300], jnp.int32)
        assert following(ids)[len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer


class Counting:
    """Dense attention that adds up the probability each token is given, per layer and KV head."""

    def __init__(self):
        self.given = []

    def attend(self, layer, q, k, v, batch, rotate):
        q, k = rotate(q), rotate(k)
        groups = q.shape[1] // k.shape[1]
        keys, values = (jnp.repeat(x, groups, axis=1) for x in (k, v))
        seen = batch.positions[None] <= batch.positions[:, None]
        scores = jnp.einsum("qhd,khd->hqk", q, keys) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        self.given.append(weights.sum(1).reshape(-1, groups, len(seen)).sum(1))
        return jnp.einsum("hqk,khd->qhd", weights, values), self


def test_h2o_counts_the_attention_of_every_query(engine, alone):
    model, core = tiny_model(), engine.core
    for name, prompt in zip("abc", PROMPTS, strict=False):
        engine.add_request(name, prompt, asking("h2o", budget=300))
    for _ in range(20):
        engine.step()
    # Steps run one ahead of what the host knows: take in the results of the last one, start no other.
    core.put_back(core._collect(core._in_flight))
    core._in_flight = None
    assert len(core.scheduler.running) == 3
    for sequence in core.scheduler.running:
        counting, known = Counting(), jnp.asarray(sequence.tokens[: sequence.num_computed], jnp.int32)
        batch = Batch(known, jnp.arange(len(known)))
        Decoder(model.config, jnp.float32).apply({"params": model.params}, batch, counting)
        for seen, given in zip(core.runner.state.kv.observed, counting.given, strict=True):
            mass = jnp.moveaxis(seen.mass[jnp.asarray(sequence.pages)], 1, 0).reshape(2, -1)
            np.testing.assert_allclose(mass[:, : len(known)], given, rtol=1e-5, atol=2e-5)
    engine.abort(list("abc"))
    while engine.has_unfinished():
        engine.step()


def test_streaming_holds_a_bounded_number_of_pages(engine):
    most = Keep("streaming", **SMALL).eviction(1).peak_pages(10**6, 16)[0]
    assert most == -(-57 // 16) + -(-40 // 16)
    engine.add_request("long", PROMPTS[3], asking("streaming"))
    while engine.has_unfinished():
        engine.step()
        assert engine.stats()["kv_live_pages"] <= most


def test_refusals_say_what_to_do():
    with pytest.raises(ConfigError, match="sliding window"):
        tiny_engine(tiny_model(window=32), sparsity="snapkv")
    with tiny_engine(sparsity=["dense", {"preset": "snapkv", "budget": 64}]) as other:
        with pytest.raises(RequestError, match=r"eviction by snapkv \(window=32, pool=7\), not by keydiff"):
            other.generate(PROMPTS[0], SamplingParams(sparsity="keydiff"))
        with pytest.raises(RequestError, match="down to at most 64 tokens, not 100"):
            other.generate(PROMPTS[3], SamplingParams(sparsity={"preset": "snapkv", "budget": 100}))
        with pytest.raises(RequestError, match="window=16"):
            other.generate(PROMPTS[3], SamplingParams(sparsity={"preset": "snapkv", "budget": 40, "window": 16}))
    for bad in (dict(budget=0), dict(pool=4), dict(window=0), dict(budget=1.5), dict(recent=True), dict(stride=3)):
        with pytest.raises(ConfigError):
            SparsityConfig.preset("snapkv", **bad)
    with pytest.raises(ConfigError, match="interval=8 must be at least window=16"):
        Keep("rkv", window=16, interval=8)
    assert Keep("h2o", interval=8).eviction(100).interval == 8, "it observes every query, whatever its window"
    with pytest.raises(ConfigError, match="not one of"):
        SparsityConfig(keep="snap")


@pytest.mark.parametrize("at,kept,interval", [(50, 20, None), (50, 20, 7), (33, 32, 16), (16, 16, 1)])
def test_peak_pages_are_those_of_a_simulation(at, kept, interval):
    eviction = Eviction(at, (kept,), interval)
    slots, computed, peak, due = 0, 0, 0, at
    for total in range(1, 150):
        if computed == due:
            peak = max(peak, -(-slots // 16) + -(-kept // 16))
            slots, due = kept, computed + interval if interval else None
        slots, computed = slots + 1, computed + 1
        peak = max(peak, -(-slots // 16))
        assert eviction.peak_pages(total, 16)[0] >= peak
        assert eviction.peak_pages(total, 16)[0] <= peak + 1
