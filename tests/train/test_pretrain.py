"""Training: the loss falls, an interrupted run ends where an uninterrupted one does, exports serve what was trained."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.models.decoder import Decoder
from sparsejax.models.dense import DenseCausal
from sparsejax.models.loader import load_model
from sparsejax.models.tokenizer import load_tokenizer
from tests.train.recipes import tiny
from train import model
from train.export import export
from train.pretrain import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(tiny(folder), folder / "run")
    trainer.run(report_every=4, save_every=100)
    return trainer


def losses(trainer: Trainer) -> list[tuple[int, float]]:
    with (trainer.out / "log.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_the_loss_falls(trained: Trainer) -> None:
    found = losses(trained)
    assert found[-1][1] < 0.9 * found[0][1]
    assert [step for step, _ in found] == list(range(4, 49, 4))


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(trained: Trainer, tmp_path: Path) -> None:
    Trainer(trained.recipe, tmp_path).run(until=28, report_every=4, save_every=15)
    again = Trainer(trained.recipe, tmp_path)
    assert (again.step, again.tokens) == (28, 28 * 4 * 48)
    again.run(report_every=4)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    assert losses(again) == losses(trained)


def test_an_export_serves_what_was_trained(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = trained.shape
    # On CPU training rounds attention's inputs to bfloat16; its other form does not, and another test compares them.
    monkeypatch.setattr(model, "causal_attention", partial(model.causal_attention, on_cpu=False))
    path = export(shape, trained.params, tmp_path, max_position=128, dtype="float32")
    loaded = load_model(str(path))
    tokens = trained.batch(0).tokens[:1]
    positions = np.arange(tokens.shape[1], dtype=np.int32)

    exact = model.Shape(**{**vars(shape), "dot_dtype": "float32"})
    hidden = model.forward(exact, trained.params, tokens, positions[None])
    expected = model.logits(exact, trained.params, hidden[0])

    batch = SimpleNamespace(tokens=jnp.asarray(tokens[0]), positions=jnp.asarray(positions))
    decoder = Decoder(loaded.config, loaded.dtype)
    hidden, _ = decoder.apply({"params": loaded.params}, batch, DenseCausal())
    found = decoder.apply({"params": loaded.params}, hidden, method="logits")
    np.testing.assert_allclose(found, expected, atol=1e-3)

    tokenizer = load_tokenizer(path)
    text = "The magic number for apple is 617.\nQ: What is the magic number for apple?\nA:"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
