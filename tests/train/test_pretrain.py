"""Training: the loss falls, an interrupted run ends where an uninterrupted one does, exports serve what was trained."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import ConfigError
from sparsejax.models.decoder import Decoder
from sparsejax.models.dense import DenseCausal
from sparsejax.models.loader import load_model
from sparsejax.models.tokenizer import load_tokenizer
from tests.train.recipes import calm, tiny
from train import model
from train.export import export
from train.feed import Feed, batch_at
from train.pretrain import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(tiny(folder), folder / "run")
    trainer.run(report_every=4, save_every=100)
    return trainer


def losses(run: Path) -> list[tuple[int, float]]:
    with (run / "log.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_the_loss_falls(trained: Trainer) -> None:
    found = losses(trained.out)
    assert found[-1][1] < 0.9 * found[0][1]
    assert [step for step, _ in found] == list(range(4, 49, 4))


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(trained: Trainer, tmp_path: Path) -> None:
    Trainer(trained.recipe, tmp_path).run(until=28, report_every=4, save_every=15)
    again = Trainer(trained.recipe, tmp_path)
    assert (again.step, again.tokens) == (28, 28 * 4 * 48)
    again.run(report_every=4)
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    assert losses(again.out) == losses(trained.out)


def test_an_export_serves_what_was_trained(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = trained.shape
    # On CPU training rounds attention's inputs to bfloat16; its other form does not, and another test compares them.
    monkeypatch.setattr(model, "causal_attention", partial(model.causal_attention, on_cpu=False))
    path = export(shape, trained.params, tmp_path, max_position=128, dtype="float32")
    loaded = load_model(str(path))
    tokens = batch_at(trained.recipe, 0).tokens[:1]
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


def test_worker_processes_make_the_same_batches(trained: Trainer) -> None:
    with Feed(trained.recipe, 22, 27, workers=2) as feed:
        for step in range(22, 27):
            jax.tree.map(np.testing.assert_array_equal, feed.take(), batch_at(trained.recipe, step))
        assert feed.take() is None


@pytest.mark.slow
def test_two_devices_train_as_one_does(tmp_path: Path) -> None:
    """The same command on a data-parallel mesh: the losses of one device, up to the order of sums."""
    alone = Trainer(calm(tmp_path), tmp_path / "alone")
    alone.run(until=4, report_every=1)
    command = [sys.executable, "-m", "train.pretrain", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "both"]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    options = ["--until", "4", "--report-every", "1"]
    printed = subprocess.run(
        [*command, *options], env=os.environ | flags, check=True, capture_output=True, text=True, timeout=300
    )
    assert "on 2 cpu device(s)" in printed.stdout
    steps, found = zip(*losses(tmp_path / "both"), strict=True)
    assert steps == (1, 2, 3, 4)
    np.testing.assert_allclose(found, [loss for _, loss in losses(tmp_path / "alone")], rtol=2e-4)


def test_rows_that_do_not_divide_over_devices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices() * 3)
    with pytest.raises(ConfigError, match="micro_rows 2 cannot be spread over 3 devices"):
        Trainer(tiny(tmp_path), tmp_path)
