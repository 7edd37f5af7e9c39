"""Byte counts of groups and layouts agree with the arrays they make."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.cache.group import dense_group, pages_for
from sparsejax.cache.paged import PagedKV
from sparsejax.errors import CapacityError
from tests.engine.models import tiny_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_bytes_are_those_of_the_arrays(dtype, page_size):
    group = dense_group(tiny_model().config, page_size, jnp.dtype(dtype), 7)
    pools = [group.layout.zeros() for _ in group.layers]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pools)) == group.pool_bytes == 7 * group.page_bytes


def test_pages_for_a_budget():
    group = dense_group(tiny_model().config, 16, np.dtype("float32"), 1)
    assert pages_for(10 * group.page_bytes + 5, (group,), 10, 10, held=(10,)) == (10,)
    assert pages_for(25 * group.page_bytes + 5, (group,), 10, 10, held=(10,)) == (25,)
    assert pages_for(10 * group.page_bytes, (group,), 1, 3, held=(1,)) == (4,)
    with pytest.raises(CapacityError, match=f"at least {2 * group.page_bytes}"):
        pages_for(2 * group.page_bytes - 1, (group,), 3, 1, held=(3,))


def test_groups_share_a_budget_so_that_each_holds_as_many_rows():
    """Beside one whole prompt; the bytes are used up but for a page of each group."""
    whole = dense_group(tiny_model().config, 16, np.dtype("float32"), 1)
    groups = whole.split((1, 1), (1, 1))
    assert [group.layers for group in groups] == [(0,), (1,)]
    for budget in range(30, 200, 7):
        upper, deeper = pages = pages_for(budget * whole.page_bytes, groups, 20, 100, held=(8, 2))
        sized = whole.split((1, 1), pages)
        used = sum(group.pool_bytes for group in sized)
        assert used <= budget * whole.page_bytes < used + whole.page_bytes
        assert abs((upper - 21) / 8 - (deeper - 21) / 2) < 1
    assert pages_for(10 * whole.page_bytes, groups, 20, 100, held=(8, 2)) == (10, 10)
    assert pages_for(10**9, groups, 20, 5, held=(8, 2)) == (21 + 32, 21 + 8)


def test_copied_pages_are_copies_and_others_stay():
    group = dense_group(tiny_model().config, 16, np.dtype("float32"), 6)
    nothing, count = (None,) * len(group.layers), 2 * len(group.layers)
    arrays = [jax.random.normal(jax.random.key(i), group.layout.shape) for i in range(count)]
    pools = tuple(zip(arrays[::2], arrays[1::2], strict=True))
    kv = PagedKV(pools, nothing, nothing, nothing, group, nothing)
    copied = kv.copy_pages(jnp.array([[2, 0]]), jnp.array([[4, 0]]))
    for before, after in zip(arrays, jax.tree.leaves(copied.pools), strict=True):
        np.testing.assert_array_equal(after[4], before[2])
        np.testing.assert_array_equal(after[:4], before[:4])
        np.testing.assert_array_equal(after[5], before[5])
