"""Trains on two devices and on one of them, and compares; its argument is a folder to write to."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from pallas_kernels.deltakv import Grid
from sparsejax.errors import ConfigError
from tests.engine.models import tiny_model
from train.compressor import Settings, Trainer

BOTH = Settings(grid=Grid(8, 4, references=4), latent=16, inner=8, layer_steps=3, model_steps=2, pages=8, rows=2)


def main(out: Path) -> None:
    """Raises AssertionError where the two differ."""
    model, rng = tiny_model(), np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (8, 48)).astype(np.int32)
    kept = [rng.standard_normal((8, 48, 2, 2, 16), np.float32) for _ in range(2)]
    data = tokens, np.ones(tokens.shape, np.float32), kept
    made = [Trainer(model, BOTH, out / str(n), data, devices=jax.devices()[:n]) for n in (1, 2)]
    sharded = made[1].spread.split(tokens[:2]).sharding
    assert len(sharded.device_set) == 2 and not sharded.is_fully_replicated
    for trainer in made:
        trainer.run()
    one, two = (trainer.params for trainer in made)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), one, two)
    try:
        Trainer(model, Settings(grid=BOTH.grid, latent=16, inner=8), out, data)
    except ConfigError as error:
        assert "rows=1 cannot be spread over 2 devices" in str(error)
    else:
        raise AssertionError("a batch of one row was spread over two devices")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
