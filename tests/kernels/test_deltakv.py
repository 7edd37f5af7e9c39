"""The DeltaKV code of sequences against NumPy, token by token, and what it promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.deltakv import Grid, code_sequence, covering, reconstructed, vectors

from . import deltakv_oracle as oracle
from .deltakv_cases import HEAD_DIM, KV_HEADS, compressor, tokens

GRIDS = {
    "usual": (Grid(8, 4), 1),
    "two groups": (Grid(8, 4), 2),
    "short list": (Grid(8, 4, references=4, shortlist=3), 1),
    "four neighbours": (Grid(8, 2, neighbours=4), 2),
    "one center": (Grid(8, 8, references=3, latents="int8"), 1),
    "an odd number of latents": (Grid(8, 8, references=3), 1),
    "nothing rounded": (Grid(8, 4, centers="none", latents="none"), 1),
}


def sequence(count: int, groups: int, seed: int = 1) -> jax.Array:
    return vectors(*map(jnp.asarray, tokens(count, seed)), groups)


@pytest.mark.parametrize("name", GRIDS)
def test_agrees_with_the_oracle(name: str):
    grid, groups = GRIDS[name]
    x, weights = sequence(67, groups), compressor(groups)
    expected, references = oracle.read(weights, grid, np.asarray(x), HEAD_DIM)
    code, _ = code_sequence(weights, grid, x[:64], HEAD_DIM)
    np.testing.assert_array_equal(code.ordinals, references)
    np.testing.assert_allclose(reconstructed(weights, grid, x, HEAD_DIM), expected, atol=2e-5)


def test_later_tokens_change_nothing_before_their_page():
    grid, weights, x = Grid(8, 4), compressor(1), sequence(64, 1)
    changed = x.at[43:].set(sequence(64, 1, seed=9)[43:])
    before, after = (reconstructed(weights, grid, one, HEAD_DIM) for one in (x, changed))
    np.testing.assert_array_equal(before[:40], after[:40])
    assert not np.array_equal(before[40:43], after[40:43])  # the page's scales are shared


def test_tokens_name_no_later_center():
    grid = Grid(16, 4, neighbours=2)
    code, _ = code_sequence(compressor(1), grid, sequence(128, 1), HEAD_DIM)
    for page, (ordinals, index) in enumerate(zip(code.ordinals, code.index, strict=True)):
        others = [t for t in range(16) if t % 4]
        assert (ordinals[index] * 4 <= np.asarray(others)[:, None] + page * 16).all()


def test_a_compressor_that_keeps_everything_loses_only_the_rounding():
    width = 2 * KV_HEADS * HEAD_DIM
    eye, none = np.eye(width, dtype=np.float32)[None], np.zeros((1, 2, 1, width), np.float32)
    weights = {"skip": eye, "gate_up": none, "down": np.zeros((1, width, 1), np.float32), "g": eye}
    x = sequence(64, 1)
    exact = Grid(8, 4, centers="none", latents="none")
    np.testing.assert_allclose(reconstructed(weights, exact, x, HEAD_DIM), x, atol=1e-5)
    errors = [
        float(jnp.abs(reconstructed(weights, Grid(8, 4, latents=bits), x, HEAD_DIM) - x).max())
        for bits in ("int8", "int4")
    ]
    assert errors[0] < 0.05 < errors[1] < 0.5


def test_gradients_pass_the_rounding():
    weights, x = compressor(1), sequence(32, 1)

    def loss(weights: dict, grid: Grid) -> jax.Array:
        return jnp.square(reconstructed(weights, grid, x, HEAD_DIM) - x).mean()

    for bits in ("int4", "none"):
        gradients = jax.grad(loss)(weights, Grid(8, 4, latents=bits))
        assert all(float(jnp.abs(gradient).max()) > 0 for gradient in gradients.values()), bits
    assert float(jax.grad(loss)(weights, Grid(8, 4))["skip"].max()) != float(gradients["skip"].max())


def test_covering_is_greedy_and_repeats_what_is_forced():
    distances = jnp.asarray([[5.0, 1.0, 4.0], [5.0, 4.0, 1.0], [5.0, 4.0, 4.5]])
    visible = jnp.asarray([[True, True, True], [True, False, True], [True, True, True]])
    np.testing.assert_array_equal(covering(distances, visible, 0, 4), [0, 2, 1, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 5}, "divide the page of 32; got 5"),
        ({"stride": 1}, "stride must be 2 or more"),
        ({"neighbours": 9}, "got 9 and 8"),
        ({"shortlist": 0}, "shortlist must be at least 1"),
        ({"latents": "int3"}, "got int8, int3"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Grid(**settings)
