"""The compressor that ships beside the embedded model: made for it, small enough, and found without being named."""

from __future__ import annotations

import numpy as np
import pytest

from sparsejax import Engine, SamplingParams
from sparsejax.cache.codecs.compressor import fingerprint, load_compressor, read_shapes
from sparsejax.cache.plan import Plan, cache_bytes
from sparsejax.engine.latents import beside
from sparsejax.models.files import EMBEDDED
from sparsejax.models.loader import load_model


def test_it_is_made_for_the_embedded_model_and_takes_at_most_a_fifth_of_its_bytes():
    model, folder = load_model(EMBEDDED), beside(EMBEDDED)
    made = load_compressor(folder, model.config, fingerprint(model.params))
    plan = Plan.of(*read_shapes(folder), model.config.num_layers)
    assert made.grid == plan.grid and made.sparse == (2, 3, 4, 5)
    held = cache_bytes(model.config, plan, 131072)
    assert held["total"] < 0.2 * held["dense"]
    assert all(np.asarray(weights["g"]).any() for weights in made.layers.values())


@pytest.mark.slow
def test_the_engine_finds_it():
    facts = " The magic number for apple is 617. box: 204; Copy 123 to lamp."
    settings = dict(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256, num_decode_steps=1, warmup="none")
    greedy = SamplingParams(temperature=0.0, max_tokens=4, stop=["\n"])
    with Engine(sparsity="deltakv", **settings) as engine:
        (output,) = engine.generate(f"{facts}\nQ: What is the magic number for apple?\nA:", greedy)
    assert "617" in output.outputs[0].text
