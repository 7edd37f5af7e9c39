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
from tests.cache.sealed_reference import LatentReference, next_logprobs
from tests.cache.test_coded import GREEDY, PROMPTS, SEEDED, assert_same, logprobs
from tests.engine.models import tiny_engine, tiny_model

GRID = Grid(16, 4, references=4, neighbours=2, shortlist=8)
LAYERS = 2
SPARSE = (1,)


def random_compressor(grid: Grid = GRID, groups: int = 1, latent: int = 12, seed: int = 0) -> Compressor:
    """Random weights: nothing is kept well, everything is used."""
    rng, width = np.random.default_rng(seed), 64 // groups
    shapes = {"skip": (latent, width), "gate_up": (2, 5, width), "down": (latent, 5), "g": (width, latent)}

    def one() -> dict[str, jax.Array]:
        return {
            name: jnp.asarray(rng.standard_normal((groups, *shape)) * 0.5 * shape[-1] ** -0.5, jnp.float32)
            for name, shape in shapes.items()
        }

    return Compressor(grid, {layer: one() for layer in SPARSE})


def saved(folder: Path, model, compressor: Compressor) -> dict[str, str]:
    """What `sparsity` takes for a compressor written to a folder."""
    save_compressor(folder, compressor, model.config, fingerprint(model.params))
    return {"preset": "deltakv", "compressor": str(folder), "select": "all", "filter_layers": None}


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
