"""A model larger than its device memory: same bits, bounded weights on the device, every byte counted."""

from __future__ import annotations

import jax
import pytest

from sparsejax import EngineConfig, SamplingParams
from sparsejax.errors import CapacityError, ConfigError
from sparsejax.models.params import param_count
from sparsejax.models.streaming import STREAMED, choose_layers, stream, streamed_layers
from tests.engine.models import random_prompts, tiny_engine, tiny_model

LAYERS = 5


def model():
    return tiny_model(layers=LAYERS)


def sizes() -> tuple[int, int]:
    """Bytes of the weights outside the layers, and of a layer."""
    params = model().params
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers_0"]))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - LAYERS * layer, layer


@pytest.mark.parametrize(("steps", "sparsity"), ((3, "dense"), pytest.param(1, "int8", marks=pytest.mark.slow)))
def test_a_model_twice_the_budget_generates_the_same_bits(steps, sparsity):
    prompts = random_prompts(2, (40, 33))
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=1, ignore_eos=True)
    settings = dict(max_num_seqs=2, num_decode_steps=steps, sparsity=sparsity)
    with tiny_engine(model(), **settings) as engine:
        expected = engine.generate(prompts, params)
        whole = engine.memory()["weights"]
        assert engine.stats()["streamed_weight_bytes"] == 0 and "host_weights" not in engine.memory()
    with tiny_engine(model(), weight_memory_bytes=whole // 2, **settings) as engine:
        found = engine.generate(prompts, params)
        memory, stats = engine.memory(), engine.stats()
    for one, other in zip(expected, found, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs
    _, layer = sizes()
    assert memory["weights"] + memory["host_weights"] == whole
    assert memory["weights"] + 2 * layer <= whole // 2 < memory["weights"] + 3 * layer
    assert stats["streamed_weight_bytes"] >= stats["steps"] * memory["host_weights"] > 0
    assert (stats["streamed_weight_bytes"] > stats["steps"] * memory["host_weights"]) == (steps > 1)


def test_as_few_layers_as_possible_are_streamed_evenly_spread():
    config, dtype = model().config, model().dtype
    top, layer = sizes()
    assert choose_layers(config, dtype, top + LAYERS * layer) == ()
    assert choose_layers(config, dtype, top + LAYERS * layer - 1) == (0, 2, 4)
    assert choose_layers(config, dtype, top + 2 * layer) == tuple(range(LAYERS))
    for budget in range(top + 2 * layer, top + LAYERS * layer, layer // 3):
        chosen = choose_layers(config, dtype, budget)
        resident = top + (LAYERS - len(chosen) + 2) * layer
        assert resident <= budget < resident + layer and list(chosen) == sorted(set(chosen))


def test_every_weight_is_held_once():
    top, layer = sizes()
    streamed = stream(model(), top + 3 * layer)
    assert sum(leaf.size for leaf in jax.tree.leaves(streamed.params)) == param_count(streamed.config)
    assert len(streamed_layers(streamed.params, LAYERS)) == 4
    places = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(streamed.params[STREAMED])}
    assert places == {"pinned_host"}


def test_a_budget_that_cannot_do_is_refused():
    top, layer = sizes()
    with pytest.raises(CapacityError, match=f"give at least {top + 2 * layer}"):
        tiny_engine(model(), weight_memory_bytes=top + layer)
    with pytest.raises(ConfigError, match="weight_memory_bytes"):
        EngineConfig(weight_memory_bytes=0)
