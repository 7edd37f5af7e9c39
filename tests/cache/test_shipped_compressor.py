"""The compressor that ships beside the embedded model: made for it, small enough, and found without being named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sparsejax import Engine, SamplingParams
from sparsejax.cache.codecs.compressor import fingerprint, load_compressor, read_shapes
from sparsejax.cache.plan import Plan, cache_bytes
from sparsejax.engine.latents import beside
from sparsejax.evaluation.suite import make_cell
from sparsejax.models.files import EMBEDDED
from sparsejax.models.loader import load_model

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/deltakv/engine.json"


def test_it_is_made_for_the_embedded_model_and_takes_at_most_a_fifth_of_its_bytes():
    model, folder = load_model(EMBEDDED), beside(EMBEDDED)
    made = load_compressor(folder, model.config, fingerprint(model.params))
    plan = Plan.of(*read_shapes(folder), model.config.num_layers)
    assert made.grid == plan.grid and made.sparse == (2, 3, 4, 5)
    held = cache_bytes(model.config, plan, 131072)
    assert held["total"] < 0.2 * held["dense"]
    assert all(np.asarray(weights["g"]).any() for weights in made.layers.values())


def test_published_answers_are_those_of_this_compressor():
    model = load_model(EMBEDDED)
    made = load_compressor(beside(EMBEDDED), model.config, fingerprint(model.params))
    published = [one for one in json.loads(RESULTS.read_text())["policies"] if one["preset"] == "deltakv"]
    ours = [one for one in published if "compressor" not in one["changed"]]
    assert ours and {one["compressor"] for one in ours} == {fingerprint(made.layers)}
    others = [one["compressor"] for one in published if one not in ours]
    assert len({*others}) == len(others) and fingerprint(made.layers) not in others


@pytest.mark.slow
def test_the_engine_finds_it_and_its_needles():
    """Without settings but those that leave fewer programs to compile; every document is longer than 15 pages."""
    settings = dict(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=640, num_decode_steps=1, warmup="none")
    with Engine(sparsity="deltakv", **settings) as engine:
        cells = [make_cell(case, 512, 4, 0, engine.tokenizer) for case in ("niah_single", "niah_multikey_dense")]
        for cell in cells:
            params = SamplingParams(temperature=0.0, max_tokens=cell.max_tokens)
            outputs = engine.generate([request.prompt for request in cell.requests], params)
            assert all(
                request.turn.score(output.outputs[0].text)
                for request, output in zip(cell.requests, outputs, strict=True)
            )
        assert engine.memory()["latent_pages"] > 0
