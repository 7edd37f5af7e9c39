"""Sealing into DeltaKV pools and attention over them: every backend against plain NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import deltakv_decode_attention, deltakv_encode, deltakv_prefill_attention
from pallas_kernels.deltakv import Grid
from pallas_kernels.deltakv_pools import read_pages

from . import deltakv_oracle
from .deltakv_cases import HEAD_DIM, Sealed, build, compressor, frequencies, rotate

GRIDS = {
    "usual": (Grid(8, 4), 1),
    "two groups, int8": (Grid(8, 2, neighbours=2, latents="int8"), 2),
    "odd number of others": (Grid(8, 8, references=3, shortlist=2), 2),
    "nothing rounded": (Grid(8, 4, centers="none", latents="none"), 1),
}
BACKENDS = ("reference", "xla")
FREQUENCIES = frequencies(HEAD_DIM)


def seal(case: Sealed, weights: dict, grid: Grid, which: list[int], backend: str, width: int | None = None, **turned):
    lists = case.moves(which, width)
    call = jax.jit(functools.partial(deltakv_encode, grid=grid, implementation=backend, **turned))
    dense = (jnp.asarray(case.k_pages), jnp.asarray(case.v_pages), lists["page_ids"], lists["targets"])
    return call(
        case.pools, weights, *dense, case.tables, lists["rows"], lists["logical"], count=np.int32(len(which))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GRIDS)
def test_sealed_pages_read_back_as_the_oracle_says(name: str, backend: str):
    grid, groups = GRIDS[name]
    case, weights = build(grid, (40, 24), groups), compressor(groups)
    pools = seal(case, weights, grid, list(range(len(case.pages))), backend, len(case.pages) + 3)
    expected = [deltakv_oracle.read(weights, grid, x, HEAD_DIM)[0] for x in case.x]
    for row, logical, physical in case.pages:
        page = read_pages(pools, weights, jnp.asarray([physical]), jnp.asarray(case.tables[row]), grid)[0]
        wanted = expected[row][logical * grid.page_size : (logical + 1) * grid.page_size]
        np.testing.assert_allclose(page, wanted, atol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_page_by_page_is_one_shot(backend: str):
    grid, groups = GRIDS["usual"]
    case, weights = build(grid, (40, 24), groups), compressor(groups)
    whole = seal(case, weights, grid, list(range(len(case.pages))), backend, 9)
    for page in range(len(case.pages)):
        case.pools = seal(case, weights, grid, [page], backend, 9)
    used = [physical for *_, physical in case.pages]
    for one, other in zip(whole, case.pools, strict=True):
        np.testing.assert_array_equal(one[np.asarray(used)], other[np.asarray(used)])


def test_rotated_keys_are_coded_as_they_were_before():
    grid, groups = GRIDS["nothing rounded"]
    case, weights = build(grid, (40, 24), groups), compressor(groups)
    every = list(range(len(case.pages)))
    plain = seal(case, weights, grid, every, "xla")
    for _, logical, physical in case.pages:
        for offset in range(grid.page_size):
            position = logical * grid.page_size + offset
            case.k_pages[physical, :, offset] = 1.3 * rotate(case.k_pages[physical, :, offset], position)
    found = seal(case, weights, grid, every, "xla", frequencies=jnp.asarray(FREQUENCIES), magnitude=1.3)
    held = np.asarray([physical for *_, physical in case.pages])
    for one, other in zip(plain, found, strict=True):
        if one is not None:
            np.testing.assert_allclose(one[held], other[held], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["usual", "two groups, int8"])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 2.0, "scale": 0.7, "magnitude": 1.3}], ids=str)
def test_a_chunk_reads_the_pages_before_each_own_one(name: str, options: dict, backend: str):
    """Every token gets what a decode query at its position over those pages gets; a row without tokens is none."""
    grid, groups = GRIDS[name]
    case, weights = build(grid, (72, 24, 16), groups), compressor(groups)
    pools = seal(case, weights, grid, list(range(len(case.pages))), "xla")
    lengths, starts = np.asarray([70, 24, 16], np.int32), np.asarray([0, 23, 23, 39], np.int32)
    q = np.random.default_rng(6).standard_normal((42, 4, HEAD_DIM)).astype(np.float32)
    attend = jax.jit(
        functools.partial(deltakv_prefill_attention, grid=grid, implementation=backend, return_lse=True, **options)
    )
    out, lse = attend(q, pools, weights, FREQUENCIES, case.tables, lengths, starts)
    rows = np.asarray([0] * 23 + [2] * 16)
    position = np.asarray([*range(47, 70), *range(16)], np.int32)
    counts = (position // grid.page_size)[:, None]
    own = case.tables[rows]
    alone = functools.partial(deltakv_decode_attention, grid=grid, implementation="xla", return_lse=True, **options)
    lists = (own[:, None], counts, position + 1, own)
    wanted, wanted_lse = jax.jit(alone)(q[:39], pools, weights, FREQUENCIES, *lists)
    np.testing.assert_allclose(out[:39], wanted, atol=1e-5)
    np.testing.assert_allclose(lse[:39], wanted_lse, atol=1e-5)
    assert not out[39:].any() and (lse[39:] < -1e29).all()


def test_pools_are_updated_in_place():
    grid, groups = GRIDS["usual"]
    case, weights = build(grid, (40, 24), groups), compressor(groups)
    lists = case.moves(list(range(len(case.pages))))

    def step(pools, k_pages, v_pages, lists, tables, count):
        moves = [lists[name] for name in ("page_ids", "targets")]
        rest = [lists[name] for name in ("rows", "logical")]
        return deltakv_encode(pools, weights, k_pages, v_pages, *moves, tables, *rest, grid=grid, count=count)

    args = (case.pools, case.k_pages, case.v_pages, lists, case.tables, np.int32(3))
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    held = sum(pool.nbytes for pool in case.pools if pool is not None)
    assert compiled.memory_analysis().alias_size_in_bytes >= held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": Grid(16, 4)}, "pages must hold 16 tokens"),
        ({"grid": Grid(8, 2)}, "centers must have shape"),
        ({"grid": Grid(8, 4, latents="int8")}, "latents must have shape|latents must be int8"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str):
    grid = Grid(8, 4)
    case, weights = build(grid, (16,), 1), compressor(1)
    call = {name: jnp.asarray(value) for name, value in case.moves([0]).items()}
    call |= {"tables": jnp.asarray(case.tables), "grid": grid} | change
    with pytest.raises((ValueError, TypeError), match=message):
        deltakv_encode(case.pools, weights, jnp.asarray(case.k_pages), jnp.asarray(case.v_pages), **call)
