"""Collecting, training, refitting and exporting DeltaKV compressors, and the masked forward pass over them."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deltakv import Grid
from sparsejax.cache.codecs.compressor import Compressor, fingerprint, load_compressor, read_shapes, save_compressor
from sparsejax.errors import ConfigError, ModelError
from sparsejax.evaluation.suite import make_cell
from sparsejax.models.decoder import Decoder
from sparsejax.models.dense import DenseCausal
from sparsejax.models.files import EMBEDDED
from sparsejax.models.loader import load_model
from sparsejax.models.tokenizer import load_tokenizer
from tests.engine.models import tiny_model
from train.ablation import variations
from train.answers import exact_answers
from train.calibrate import refitted
from train.collect import Source, collect, load_layers
from train.compressor import Settings, Trainer
from train.history import CompressedHistory
from train.pairs import mean_error, pair_error, pairs_of, principal, shapes
from train.sensitivity import FLOOR, Moved, sensitivities

GRID = Grid(8, 4, references=4)
SAME = jnp.eye(64)[None]
SETTINGS = Settings(grid=GRID, latent=16, inner=8, layer_steps=30, model_steps=2, pages=8, rate=3e-3)


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=2560)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("kv")
    text = out / "text.jsonl"
    words = " ".join(f"The small box {i} is here." for i in range(400))
    text.write_text(json.dumps({"text": words}) + "\n")
    collect(model, load_tokenizer(EMBEDDED), out / "run", Source(str(text)), count=8, length=48, shard=5)
    return load_layers(out / "run")


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(model, SETTINGS, tmp_path_factory.mktemp("run"), data)
    trainer.run(report_every=10)
    return trainer


def read(model, kv, tokens) -> tuple[jax.Array, Any]:
    batch = SimpleNamespace(tokens=jnp.asarray(tokens), positions=jnp.arange(len(tokens), dtype=jnp.int32))
    return Decoder(model.config, model.dtype).apply({"params": model.params}, batch, kv)


def hidden(model, kv, tokens) -> jax.Array:
    return read(model, kv, tokens)[0]


def test_collection_holds_what_layers_store_and_goes_on(model, tmp_path: Path):
    source, tokenizer = Source(cases=("kv_dense",)), load_tokenizer(EMBEDDED)
    facts = collect(model, tokenizer, tmp_path, source, count=3, length=64, shard=2)
    tokens, weights, kept = load_layers(tmp_path)
    assert tokens.shape == weights.shape == (3, 64) and (weights == 1).sum() > 0
    assert [layer.shape for layer in kept] == [(3, 64, 2, 2, 16)] * 2
    np.testing.assert_allclose(facts["mean_squares"][1], np.square(kept[1]).mean((0, 1, 2, 4)), rtol=0.3)
    assert facts["base_model"] == fingerprint(model.params)
    (tmp_path / "shard-00001.npz").unlink()
    first = (tmp_path / "shard-00000.npz").stat().st_mtime_ns
    assert collect(model, tokenizer, tmp_path, source, count=3, length=64, shard=2) == facts
    assert (tmp_path / "shard-00000.npz").stat().st_mtime_ns == first
    np.testing.assert_array_equal(load_layers(tmp_path)[0], tokens)
    with pytest.raises(ConfigError, match="a collection with other length"):
        collect(model, tokenizer, tmp_path, source, count=3, length=72, shard=2)
    with pytest.raises(ConfigError, match="there is no file"):
        collect(model, tokenizer, tmp_path / "other", Source("absent.txt"), count=3, length=64)


def log_of(trainer: Trainer) -> list[dict[str, str]]:
    with (trainer.out / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_both_stages_train(trained: Trainer):
    rows = log_of(trained)
    assert [(int(row["step"]), row["stage"]) for row in rows] == [
        (0, "start"), (10, "layers"), (20, "layers"), (30, "layers"), (30, "refit"), (32, "model")
    ]
    assert float(rows[4]["error"]) <= float(rows[0]["error"])  # the best of the stage, which may be its start
    assert [bool(row["divergence"]) for row in rows] == [False] * 4 + [True] * 2


def test_a_stage_never_ends_worse_than_it_began(model, data, tmp_path: Path):
    """Even at a rate that throws everything out."""
    wild = dataclasses.replace(SETTINGS, layer_steps=20, rate=3.0, model_rate=3.0)
    trainer = Trainer(model, wild, tmp_path, data)
    start = trainer.params
    trainer.run(report_every=10)
    rows = log_of(trainer)
    errors = {row["stage"]: float(row["error"]) for row in rows}
    assert errors["layers"] > 2 * errors["start"] >= 2 * errors["refit"]
    assert float(rows[-1]["divergence"]) > 2 * float(rows[-2]["divergence"])
    kept = {name: refitted(one, trainer.pairs[name]) for name, one in start.items()}
    error = mean_error(trainer.params, trainer.held)
    assert error == min(mean_error(one, trainer.held) for one in (start, kept))


def test_refitting_lowers_the_error(model, data, trained: Trainer):
    pairs = trained.pairs["1"]
    start = principal(pairs, 16, 8, 0)
    assert float(pair_error(refitted(start, pairs), pairs)) < float(pair_error(start, pairs))


def test_sensitivity_predicts_how_far_answers_move(model, data):
    """The divergence under small random errors of every token is half their size in the metric, on average."""
    tokens = data[0][:1]
    n, rows = tokens.shape[1], 24
    metric = sensitivities(model, np.repeat(tokens, rows, axis=0), (1,), 1)["1"][0]
    decoder = Decoder(model.config, model.dtype)

    @jax.jit
    def divergence(noise: jax.Array) -> jax.Array:
        def read(offsets: jax.Array) -> jax.Array:
            both = jnp.zeros_like(offsets), offsets
            kept = hidden(model, Moved(DenseCausal.of(model.config), both), tokens[0])
            return jax.nn.log_softmax(decoder.apply({"params": model.params}, kept, method="logits"))

        dense, found = read(jnp.zeros_like(noise)), read(noise)
        return (jnp.exp(dense) * (dense - found)).sum()

    errors = 0.02 * np.random.default_rng(0).standard_normal((rows, n, 2, 2, 16)).astype(np.float32)
    apart = np.mean([divergence(jnp.asarray(one)) for one in errors])
    x = errors.reshape(rows * n, -1)
    predicted = 0.5 * n * np.einsum("tw,wx,tx->t", x, metric, x).mean()
    assert 0.6 < apart / predicted < 1.6


def test_components_in_a_metric_are_the_best_in_it(model, data):
    rng = np.random.default_rng(0)
    metric = rng.standard_normal((1, 64, 64)) * np.geomspace(1, 30, 64)
    metric = jnp.asarray(metric @ metric.swapaxes(1, 2), jnp.float32)
    exact = dataclasses.replace(GRID, latents="none")
    weighted, plain = pairs_of(data[2][1], exact, 1, metric), pairs_of(data[2][1], exact, 1)
    whole = metric * 64 / jnp.trace(metric[0]) + FLOOR * jnp.eye(64)
    np.testing.assert_allclose(weighted.root @ weighted.root, whole, atol=1e-3)
    best, other = principal(weighted, 16, 8, 0), principal(plain, 16, 8, 0)
    assert pair_error(best, weighted) < 0.9 * pair_error(refitted(other, plain), weighted)
    assert pair_error(other, plain) < pair_error(refitted(best, weighted), plain)


def test_resumed_is_uninterrupted(model, data, trained: Trainer, tmp_path: Path):
    Trainer(model, SETTINGS, tmp_path, data).run(until=20, report_every=10)
    again = Trainer(model, SETTINGS, tmp_path, data)
    assert again.step == 20
    again.run(report_every=10)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)


def test_reading_everything_raw_is_dense_attention(model, trained: Trainer, data):
    tokens = data[0][0][:43]
    layers = (None, trained.params["1"])
    expected = hidden(model, DenseCausal(), tokens)
    raw = hidden(model, CompressedHistory(layers, jnp.asarray([43]), (GRID, GRID), 43), tokens)
    np.testing.assert_allclose(raw, expected, atol=2e-5)


def test_visibility_depends_on_position(model, trained: Trainer, data):
    """The first page is dense; a prompt that is raw until its end is dense until there, compressed after it."""
    tokens, layers = data[0][0][:40], (None, trained.params["1"])
    expected = hidden(model, DenseCausal(), tokens)
    for raw_until, dense in ((0, 8), (20, 20)):
        found = hidden(model, CompressedHistory(layers, jnp.asarray([raw_until]), (GRID, GRID), 40), tokens)
        np.testing.assert_allclose(found[:dense], expected[:dense], atol=2e-5)
        assert float(jnp.abs(found[dense:] - expected[dense:]).max()) > 1e-3


@pytest.mark.parametrize("codecs", ({}, {1: "int8"}))
def test_a_compressor_survives_its_file(model, trained: Trainer, tmp_path: Path, codecs: dict[int, str]):
    base = fingerprint(model.params)
    made = Compressor(GRID, {int(name): weights for name, weights in trained.params.items()}, codecs)
    found = load_compressor(save_compressor(tmp_path, made, model.config, base), model.config, base)
    assert found.grid == GRID and found.sparse == (1,) and found.codecs == codecs
    assert read_shapes(tmp_path) == found.facts
    assert ("codecs" in json.loads((tmp_path / "compressor.json").read_text())) == bool(codecs)
    jax.tree.map(np.testing.assert_array_equal, found.layers, made.layers)


CASES = ("model", "size", "truncated", "nan", "missing", "shape", "grid", "absent", "codec", "stray")


@pytest.mark.parametrize("case", CASES)
def test_a_bad_compressor_is_refused(model, trained: Trainer, tmp_path: Path, case: str):
    base, config = fingerprint(model.params), model.config
    weights = {name: np.array(value) for name, value in trained.params["1"].items()}
    if case == "nan":
        weights["g"][0, 3, 2] = np.nan
    save_compressor(tmp_path, Compressor(GRID, {1: weights}), config, base)
    facts = json.loads((tmp_path / "compressor.json").read_text())
    tensors = tmp_path / "compressor.safetensors"
    message = {
        "model": r"trained for another model: base_model \w+ \(the model has 0000",
        "size": "head_dim 32",
        "truncated": "is truncated",
        "nan": "layers.1.g holds 1 values that are not finite",
        "missing": "layers.2.g is missing",
        "shape": r"layers.1.g is \[1, 64, 16\], not \[1, 64, 17\]",
        "grid": "stride must be 2 or more and divide the page of 8; got 3",
        "absent": "compressor.json is missing",
        "codec": "layer 1 in .*compressor.json has latents in 'int5'; they can be int4, int8, none",
        "stray": r"must be named by layers among \[1\]; got {'2': 'int8'}",
    }[case]
    if case == "size":
        facts["model"]["head_dim"] = 32
    if case == "missing":
        facts["tensors"]["layers.2.g"] = [1]
    if case == "shape":
        facts["tensors"]["layers.1.g"] = [1, 64, 17]
    if case in ("codec", "stray"):
        facts["codecs"] = {"codec": {"1": "int5"}, "stray": {"2": "int8"}}[case]
    if case == "grid":
        facts["grid"]["stride"] = 3
    (tmp_path / "compressor.json").write_text(json.dumps(facts))
    if case == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    if case == "absent":
        (tmp_path / "compressor.json").unlink()
    with pytest.raises(ModelError, match=message):
        load_compressor(tmp_path, config, "0000" if case == "model" else base)


def test_a_fingerprint_is_that_of_the_weights_not_of_their_dtype(model):
    coarse = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    assert fingerprint(coarse) == fingerprint(model.params)
    changed = jax.tree.map(lambda leaf: leaf, model.params)
    changed["final_norm"] = changed["final_norm"] + 1
    assert fingerprint(changed) != fingerprint(model.params)


def test_a_width_and_a_codec_for_each_layer_are_trained(data, tmp_path: Path):
    model = tiny_model(vocab_size=2560, layers=3)
    tokens, weights, kept = data
    chosen = dataclasses.replace(SETTINGS, latent=(8, 24), codecs=("int8", "int4"), layer_steps=1, model_steps=1)
    trainer = Trainer(model, chosen, tmp_path, (tokens, weights, [*kept, kept[1]]), metric={"1": SAME, "2": SAME})
    assert [weights["g"].shape for weights in trainer.params.values()] == [(1, 64, 8), (1, 64, 24)]
    assert [trainer.held[name].grid.latents for name in ("1", "2")] == ["int8", "int4"]
    coarse = trainer.held["1"].stored_as("int4")
    assert pair_error(trainer.params["1"], trainer.held["1"]) < pair_error(trainer.params["1"], coarse)
    trainer.run()
    history = CompressedHistory((None, *trainer.params.values()), jnp.asarray([0]), chosen.grids(3), 40)
    finer = dataclasses.replace(history, grids=(GRID, *[dataclasses.replace(GRID, latents="int8")] * 2))
    (_, as_chosen), (_, all_fine) = (read(model, kv, tokens[0][:40]) for kv in (history, finer))
    assert as_chosen.losses[0] == all_fine.losses[0] and as_chosen.losses[1] > all_fine.losses[1]


def test_the_ablation_changes_one_thing_at_a_time():
    base, *others = variations(5, 7).values()
    differing = [
        [name for name in vars(base) if getattr(one, name) != getattr(base, name)] for one in others if one != base
    ]
    assert all(len(names) == 1 or {"layer_steps", "model_steps"} <= {*names} for names in differing)
    assert max(map(len, differing)) == 3


def test_answers_read_raw_are_those_of_the_model():
    """The embedded model answers its own documents; a compressor that keeps nothing loses them, unless read raw."""
    whole = load_model(EMBEDDED)
    grids = (Grid(),) * whole.config.num_layers
    tokenizer = load_tokenizer(EMBEDDED)
    cell = make_cell("niah_single_dense", 200, 2, 0, tokenizer)
    shapes_ = shapes(256, 1, 1, 1)
    layers = [{name: jnp.zeros(shape) for name, shape in shapes_.items()}] * whole.config.num_layers
    answers = {v: exact_answers(whole, tokenizer, cell, layers, grids, v) for v in ("dense", "sealed")}
    assert answers == {"dense": [True, True], "sealed": [False, False]}
    with pytest.raises(ConfigError, match="visibility 'raw' is unknown"):
        exact_answers(whole, tokenizer, cell, layers, grids, "raw")
