"""The CPU form of training attention against the plain one, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.attention import causal_attention


@pytest.mark.parametrize(("groups", "length"), [(2, 48), (1, 136)])
def test_both_forms_agree(groups: int, length: int) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    q, gradient = (jax.random.normal(key, (2, 2, groups, length, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 2, length, 16)) for key in keys[2:])

    def run(on_cpu: bool) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(lambda q, k, v: causal_attention(q, k, v, on_cpu=on_cpu), q, k, v)
        return out, *back(gradient)

    for ours, plain in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(ours, plain, atol=0.03 * float(jnp.abs(plain).max()))  # inputs rounded to bfloat16


def test_nothing_reads_the_future() -> None:
    q, k, v = (jax.random.normal(jax.random.key(1), (1, 1, *dims)) for dims in ((1, 80, 16), (80, 16), (80, 16)))
    before = causal_attention(q, k, v)
    after = causal_attention(q, k.at[:, :, 60:].set(9.0), v.at[:, :, 60:].set(9.0))
    np.testing.assert_array_equal(before[..., :60, :], after[..., :60, :])
    assert not np.array_equal(before[..., 60:, :], after[..., 60:, :])
