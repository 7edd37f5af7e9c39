"""Rotary embeddings: closed forms, limits and the properties that attention relies on."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import ConfigError
from sparsejax.models.config import RopeConfig
from sparsejax.models.rope import apply_rope, inverse_frequencies, rope_tables, rotation

PLAIN = inverse_frequencies(RopeConfig(theta=10000.0), 32)


def test_default_is_a_geometric_series():
    np.testing.assert_allclose(PLAIN, [10000.0 ** (-2 * i / 32) for i in range(16)], rtol=1e-6)


def test_linear_divides_every_frequency():
    scaled = inverse_frequencies(RopeConfig(kind="linear", factor=4.0), 32)
    np.testing.assert_allclose(scaled, PLAIN / 4, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_extensions_keep_short_waves_and_stretch_long_ones(kind):
    scaled = inverse_frequencies(RopeConfig(kind=kind, factor=8.0, original_max_position=1024), 32)
    assert scaled[0] == PLAIN[0]
    np.testing.assert_allclose(scaled[-1], PLAIN[-1] / 8, rtol=1e-6)
    ratio = PLAIN / scaled
    assert np.all(np.diff(ratio) >= -1e-6)


def test_yarn_magnitude():
    base = {"kind": "yarn", "factor": 4.0, "original_max_position": 64}
    assert RopeConfig(**base).magnitude == pytest.approx(0.1 * math.log(4) + 1)
    assert RopeConfig(**base, attention_factor=1.5).magnitude == 1.5
    both = RopeConfig(**base, mscale=2.0, mscale_all_dim=1.0).magnitude
    assert both == pytest.approx((0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1))
    assert RopeConfig(**base, mscale=2.0).magnitude == RopeConfig(**base).magnitude
    assert RopeConfig().magnitude == 1.0


def test_scores_depend_on_relative_position_only():
    q, k = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 32)).astype(np.float32))
    rope = RopeConfig()

    def score(i: int, j: int) -> float:
        rotated_q = rotation(rope, 32, jnp.array([i]))(q)
        rotated_k = rotation(rope, 32, jnp.array([j]))(k)
        return float((rotated_q * rotated_k).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_position_zero_is_the_identity_and_dtype_is_kept():
    x = jnp.ones((2, 3, 32), jnp.bfloat16)
    cos, sin = rope_tables(RopeConfig(), 32, jnp.array([0, 5]))
    assert cos.dtype == sin.dtype == jnp.float32
    out = apply_rope(x, cos, sin)
    assert out.dtype == x.dtype
    np.testing.assert_array_equal(out[0], x[0])
    assert not np.array_equal(out[1], x[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dynamic"}, "known: default, linear, llama3, yarn"),
        ({"kind": "yarn"}, "original_max_position_embeddings"),
        ({"theta": 0.0}, "theta"),
        ({"kind": "linear", "factor": 0.0}, "factor"),
        ({"kind": "llama3", "original_max_position": 64, "low_freq_factor": 4.0}, "low_freq_factor"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**fields)
