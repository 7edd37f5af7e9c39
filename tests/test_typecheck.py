"""The run-time checks of array annotations are on in tests."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Array, Float

from sparsejax.engine.sampler import sample_greedy
from tests.typecheck import arrays_only, is_array_hint


@pytest.mark.parametrize(
    ("hint", "checked"),
    [
        (Float[Array, "B H D"], True),
        (tuple[Float[Array, "B H D"], Float[Array, "B H"]], True),
        (Float[Array, " B"] | None, True),
        (tuple[Float[Array, "T E"], pytest.Config], False),
        (Callable[[int], Array], False),
        (int | None, False),
    ],
)
def test_which_hints_are_checked(hint, checked):
    assert is_array_hint(hint) is checked


def test_our_functions_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(sample_greedy, jax.ShapeDtypeStruct((2, 3, 4), jnp.float32))


def test_axes_must_agree_and_other_hints_are_free():
    @jaxtyping.jaxtyped(typechecker=arrays_only)
    def add(a: Float[Array, "B D"], b: Float[Array, "B D"], then: Callable[[], None]) -> Float[Array, "B D"]:
        return a + b

    assert add(jnp.ones((2, 3)), jnp.ones((2, 3)), "no callable").shape == (2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        add(jnp.ones((2, 3)), jnp.ones((1, 3)), None)
