"""Engines under DeltaKV: equal to the plain rule, whatever the batch, the chunks or the pool."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deltakv import Grid
from sparsejax.cache.codecs.compressor import Compressor, fingerprint, save_compressor
from sparsejax.cache.plan import Plan, cache_bytes
from tests.cache.sealed_reference import LatentReference, next_logprobs
from tests.cache.test_coded import GREEDY, PROMPTS, SEEDED, assert_same, logprobs
from tests.engine.in_place import assert_in_place
from tests.engine.models import tiny_engine, tiny_model

GRID = Grid(16, 4, references=4, neighbours=2, shortlist=8)
LAYERS = 2


def random_compressor(
    grid: Grid = GRID, groups: int = 1, latents: tuple[int, ...] = (12,), codecs: dict[int, str] | None = None
) -> Compressor:
    """Random weights: nothing is kept well, everything is used. One layer for each of the `latents`, from 1 on."""
    rng, width = np.random.default_rng(0), 64 // groups

    def one(latent: int) -> dict[str, jax.Array]:
        shapes = {"skip": (latent, width), "gate_up": (2, 5, width), "down": (latent, 5), "g": (width, latent)}
        return {
            name: jnp.asarray(rng.standard_normal((groups, *shape)) * 0.5 * shape[-1] ** -0.5, jnp.float32)
            for name, shape in shapes.items()
        }

    layers = {layer: one(latent) for layer, latent in enumerate(latents, start=1)}
    return Compressor(grid, layers, codecs or {})


def saved(folder: Path, model, compressor: Compressor) -> dict[str, str]:
    """What `sparsity` takes for a compressor written to a folder."""
    save_compressor(folder, compressor, model.config, fingerprint(model.params))
    return {"preset": "deltakv", "compressor": str(folder), "select": "all", "filter_layers": None}


def stored_as(codec: str, folders: pytest.TempPathFactory) -> str | dict[str, str]:
    """What `sparsity` takes for a codec of the tiny model, DeltaKV with random weights among them."""
    return saved(folders.mktemp("compressor"), tiny_model(), random_compressor()) if codec == "deltakv" else codec


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=LAYERS)


@pytest.fixture(scope="module")
def sparsity(model, tmp_path_factory: pytest.TempPathFactory):
    return saved(tmp_path_factory.mktemp("compressor"), model, random_compressor())


@pytest.fixture(scope="module")
def engine(model, sparsity):
    with tiny_engine(model, sparsity=sparsity) as engine:
        yield engine


@pytest.fixture(scope="module")
def wanted(engine):
    """Each request alone."""
    return {params.n: [engine.generate(prompt, params)[0] for prompt in PROMPTS] for params in (GREEDY, SEEDED)}


def test_tokens_are_those_of_the_plain_rule(model, wanted):
    """A value between two codes may fall to either of them, and all that is coded after it then differs a little."""
    for prompt, output in zip(PROMPTS, wanted[1], strict=True):
        (choice,) = output.outputs
        kv = LatentReference(random_compressor(), "int4", model.config.windows)
        rule = next_logprobs(model, kv, prompt + choice.token_ids)[len(prompt) - 1 : -1]
        assert rule.argmax(-1).tolist() == choice.token_ids
        assert np.median(np.abs(logprobs(choice) - rule.max(-1))) < 0.02


def test_without_rounding_log_probabilities_are_those_of_the_plain_rule(model, tmp_path):
    """Two head groups; filter layers in the model's dtype."""
    made = random_compressor(dataclasses.replace(GRID, centers="none", latents="none"), groups=2)
    with tiny_engine(model, sparsity=saved(tmp_path, model, made) | {"filter_codec": "dense"}) as engine:
        outputs = engine.generate(PROMPTS[3:5], GREEDY)
    for prompt, output in zip(PROMPTS[3:5], outputs, strict=True):
        (choice,) = output.outputs
        kv = LatentReference(made, "dense", model.config.windows)
        rule = next_logprobs(model, kv, prompt + choice.token_ids)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logprobs(choice), rule.max(-1), atol=2e-4)


def test_each_layer_reads_latents_of_its_own_width_and_codec(tmp_path):
    """Tokens are those of the plain rule, pools those of the plan."""
    model, made = tiny_model(layers=3), random_compressor(latents=(12, 8), codecs={2: "int8"})
    with tiny_engine(model, sparsity=saved(tmp_path, model, made), max_num_seqs=4, max_model_len=128) as engine:
        (choice,) = engine.generate(PROMPTS[3], GREEDY)[0].outputs
        kv = engine.core.runner.state.kv
        assert [pools[0].latents.dtype for pools in kv.pools[1:]] == [jnp.uint8, jnp.int8]
        group, memory = kv.group, engine.memory()
        told = 4 * cache_bytes(model.config, Plan.of(*made.facts, 3), 128, model.dtype)["total"]
        stored = sum(memory[name] for name in ("kv_pages", "latent_pages", "open_pages"))
        assert stored - group.page_bytes - group.row_bytes == told
    rule = LatentReference(made, "int4", model.config.windows)
    found = next_logprobs(model, rule, PROMPTS[3] + choice.token_ids)[len(PROMPTS[3]) - 1 : -1]
    assert found.argmax(-1).tolist() == choice.token_ids
    assert np.median(np.abs(logprobs(choice) - found.max(-1))) < 0.02


def test_latents_change_what_is_read(model, wanted):
    with tiny_engine(model, sparsity="int4") as other:
        theirs = other.generate(PROMPTS[4], GREEDY)
    (ours,) = wanted[1][4].outputs
    assert abs(logprobs(ours)[0] - logprobs(theirs[0].outputs[0])[0]) > 1e-3


def test_batch_equals_alone(engine, wanted):
    for params in (GREEDY, SEEDED):
        assert_same(engine.generate(PROMPTS, params), wanted[params.n])
        assert_same(engine.generate(PROMPTS[::-1], params), wanted[params.n][::-1])
    assert engine.stats()["kv_live_pages"] == 0


@pytest.mark.slow
def test_chunks_and_decode_steps_change_nothing(model, sparsity, wanted):
    with tiny_engine(model, sparsity=sparsity, max_num_seqs=3, max_num_batched_tokens=20, num_decode_steps=5) as engine:
        assert_same(engine.generate(PROMPTS, GREEDY), wanted[1])
        assert_same(engine.generate(PROMPTS, SEEDED), wanted[3])


def test_preempted_equals_uninterrupted(engine, wanted):
    allocator = engine.core.scheduler.allocator
    taken = allocator.allocate(allocator.num_free - 11)  # eleven pages are left
    for params in (GREEDY, SEEDED):
        before = engine.stats()["num_preemptions"]
        assert_same(engine.generate(PROMPTS, params), wanted[params.n])
        assert engine.stats()["num_preemptions"] > before
    allocator.release(taken)
    assert engine.stats()["kv_live_pages"] == 0


def test_samples_share_full_pages(engine):
    engine.add_request("r", PROMPTS[4], SEEDED)
    most = 0
    while engine.has_unfinished():
        engine.step()
        most = max(most, engine.stats()["kv_live_pages"])
    shared = len(PROMPTS[4]) // 16
    assert most <= shared + SEEDED.n * (-(-(len(PROMPTS[4]) + SEEDED.max_tokens) // 16) - shared)


def test_aborts_leave_no_trace(engine, wanted):
    for steps in (1, 2, 4, 7):
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(f"{i}", prompt, SEEDED if i % 2 else GREEDY)
        for _ in range(steps):
            engine.step()
        engine.abort([f"{i}" for i in range(0, len(PROMPTS), 2)])
        while engine.has_unfinished():
            engine.step()
    assert engine.stats()["kv_live_pages"] == 0
    assert_same(engine.generate(PROMPTS, GREEDY), wanted[1])


def test_what_no_sequence_holds_is_never_read(engine, wanted):
    """NaN in every scale and open page, and codes and references that name anything, leave all answers as they are."""

    def poison(pool):
        value = jnp.nan if jnp.issubdtype(pool.dtype, jnp.floating) else 77
        return jnp.full_like(pool, value)

    runner = engine.core.runner
    kv = dataclasses.replace(runner.state.kv, pools=jax.tree.map(poison, runner.state.kv.pools))
    runner.state = dataclasses.replace(runner.state, kv=kv)
    for params in (GREEDY, SEEDED):
        assert_same(engine.generate(PROMPTS, params), wanted[params.n])


def test_pools_are_updated_in_place(model, sparsity):
    long = dataclasses.replace(model, config=dataclasses.replace(model.config, max_position_embeddings=4096))
    with tiny_engine(long, sparsity=sparsity, warmup="lazy") as engine:
        assert_in_place(engine)


@pytest.mark.parametrize("filter_codec", ["int4", "int8", "dense"])
def test_memory_is_what_is_allocated_and_what_the_calculator_says(model, sparsity, filter_codec):
    given = sparsity | {"filter_codec": filter_codec}
    with tiny_engine(model, sparsity=given, max_num_seqs=4, max_model_len=512) as engine:
        runner, memory = engine.core.runner, engine.memory()
        arrays = jax.tree.leaves((runner.state, runner.params))
        assert memory["total"] == sum(array.nbytes for array in arrays)
        assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
        made = random_compressor()
        assert memory["compressor"] == sum(leaf.nbytes for leaf in jax.tree.leaves(made.layers))
        stored = sum(memory.get(name, 0) for name in ("kv_pages", "latent_pages", "open_pages"))
        assert stored == runner.state.kv.group.pool_bytes
        plan = Plan.of(*made.facts, LAYERS, filter_codec)
        told = 4 * cache_bytes(model.config, plan, 512, model.dtype)["total"]
        spare = runner.state.kv.group.page_bytes + runner.state.kv.group.row_bytes  # page and row of padding
        assert stored - spare == told
