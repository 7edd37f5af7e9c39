"""What must hold between the ops: bounds bound, whole budgets are dense, partial results merge, codes invert."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as ops
from pallas_kernels import codes
from pallas_kernels.select_pages import xla as select_xla
from pallas_kernels.select_pages.pinned import terms

ROWS, WIDTH, PAGE, HEADS, KV_HEADS, DIM = 2, 6, 16, 4, 2, 16
PAGES = ROWS * WIDTH + 1
bounds_of = jax.jit(functools.partial(ops.page_bounds, implementation="xla"))
scores_of = jax.jit(functools.partial(ops.page_scores, implementation="xla", scale=1.0))
select = jax.jit(functools.partial(ops.select_pages, implementation="xla", width=WIDTH))
decode = jax.jit(functools.partial(ops.paged_decode_attention, implementation="xla", return_lse=True))
coded_decode = jax.jit(functools.partial(ops.quantized_decode_attention, implementation="xla", return_lse=True))
encode = jax.jit(functools.partial(ops.quantize_pages, implementation="xla", head_dim=DIM))
reopen = jax.jit(functools.partial(ops.open_pages, implementation="xla", head_dim=DIM))
merge = jax.jit(ops.merge_partials)
seeds = st.integers(0, 2**32 - 1)


def pool(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((PAGES, KV_HEADS, PAGE, DIM)).astype(np.float32)


def lists(rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.arange(1, PAGES)).astype(np.int32).reshape(ROWS, 1, WIDTH)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from((np.float32, jnp.bfloat16)))
def test_no_score_exceeds_its_bound(seed, dtype):
    rng = np.random.default_rng(seed)
    keys, ids = pool(rng), lists(rng)
    q = rng.standard_normal((ROWS, HEADS, DIM)).astype(np.float32)
    bounds = bounds_of(np.zeros((PAGES, KV_HEADS, 2 * DIM), dtype), keys, np.arange(PAGES, dtype=np.int32))
    counts = np.full((ROWS, 1), WIDTH, np.int32)
    bound = np.asarray(scores_of(q, bounds, ids, counts))
    scores = np.einsum("bkgd,bskpd->bkgsp", q.reshape(ROWS, KV_HEADS, -1, DIM), keys[ids[:, 0]])
    assert (scores.max((2, 4)) <= bound + 1e-4).all()


@settings(max_examples=20, deadline=None)
@given(
    seeds,
    st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS),
    st.lists(st.integers(0, WIDTH + 2), min_size=ROWS, max_size=ROWS),
    st.booleans(),
)
def test_selection_keeps_the_best_and_whole_budgets_are_dense(seed, held, budgets, ties):
    rng = np.random.default_rng(seed)
    k_pages, v_pages, ids = pool(rng), pool(rng), lists(rng)
    q = rng.standard_normal((ROWS, HEADS, DIM)).astype(np.float32)
    scores = rng.standard_normal((ROWS, KV_HEADS, WIDTH)).astype(np.float32)
    scores = np.round(scores) if ties else scores
    counts, lengths = np.asarray(held, np.int32)[:, None], np.asarray(held, np.int32) * PAGE
    chosen = select(scores, ids, counts, np.asarray(budgets, np.int32))
    for row, head in np.ndindex(ROWS, KV_HEADS):
        kept = np.asarray(chosen.logical_ids[row, head, : chosen.counts[row, head]])
        assert len(kept) == min(held[row], max(budgets[row], min(1, held[row])))
        assert (np.diff(kept) > 0).all() and (ids[row, 0, kept] == chosen.page_ids[row, head, : len(kept)]).all()
        others = np.setdiff1d(np.arange(held[row]), kept)
        if len(others):
            assert kept[-1] == held[row] - 1
            assert scores[row, head, others].max() <= scores[row, head, kept[:-1]].min(initial=np.inf)
    by_head = np.repeat(ids, KV_HEADS, axis=1), np.repeat(counts, KV_HEADS, axis=1)
    every = np.broadcast_to(np.arange(WIDTH, dtype=np.int32), by_head[0].shape)
    dense = decode(q, k_pages, v_pages, *by_head, lengths, logical_ids=every)
    all_pages = select(scores, ids, counts, np.full(ROWS, WIDTH, np.int32))
    chosen = all_pages.page_ids, all_pages.counts
    whole = decode(q, k_pages, v_pages, *chosen, lengths, logical_ids=all_pages.logical_ids)
    plain = decode(q, k_pages, v_pages, ids, counts, lengths)
    for a, b, c in zip(whole, dense, plain, strict=True):
        np.testing.assert_array_equal(a, b)  # one program: the same bits
        np.testing.assert_allclose(a, c, atol=1e-6, rtol=1e-6)  # without logical ids it is another


@jax.jit
def both_ways(scores, counts, budgets, sinks, recents):
    """The entries that a partial sort and a bisection select, and how many."""
    given = terms(scores, counts, budgets, 5, sinks, recents)
    keys = jnp.where(given.pinned, jnp.inf, scores)
    return *(entries(5)(keys, given) for entries in (select_xla._sorted, select_xla._bisected)), given.amount


@settings(max_examples=30, deadline=None)
@given(seeds, st.booleans())
def test_a_partial_sort_selects_what_a_bisection_does(seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.choice([-np.inf, -1e30, -1.0, -0.0, 0.0, 2.0], (4, 2, 9)) if ties else rng.normal(size=(4, 2, 9))
    counts, budgets, sinks, recents = (rng.integers(0, top, 4).astype(np.int32) for top in (10, 10, 3, 3))
    sort, bisection, amount = map(
        np.asarray, both_ways(scores.astype(np.float32), counts[:, None], budgets, sinks, recents)
    )
    for row, head in np.ndindex(4, 2):
        chosen = slice(amount[row, head])
        assert sort[row, head, chosen].tolist() == bisection[row, head, chosen].tolist()


@settings(max_examples=15, deadline=None)
@given(seeds, st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS))
def test_partial_results_merge_to_the_whole(seed, split):
    rng = np.random.default_rng(seed)
    k_pages, v_pages, ids = pool(rng), pool(rng), lists(rng)
    q = rng.standard_normal((ROWS, HEADS, DIM)).astype(np.float32)
    lengths = np.asarray([WIDTH * PAGE, 0], np.int32)
    whole = decode(q, k_pages, v_pages, ids, np.full((ROWS, 1), WIDTH, np.int32), lengths)
    at = np.asarray(split, np.int32)[:, None]
    entry = np.minimum(np.arange(WIDTH) + at, WIDTH - 1).astype(np.int32)[:, None]
    first = decode(q, k_pages, v_pages, ids, at, lengths)
    rest = np.take_along_axis(ids, entry, axis=2)
    second = decode(q, k_pages, v_pages, rest, WIDTH - at, lengths, logical_ids=entry)
    for a, b in zip(merge(first, second), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("codec", "error"), (("int8", 0.02), ("fp8", 0.08), ("int4", 0.25)))
def test_attention_over_codes_is_attention_over_what_they_open_to(codec, error):
    rng = np.random.default_rng(6)
    k_pages, v_pages, ids = pool(rng), pool(rng), lists(rng)
    q = rng.standard_normal((ROWS, HEADS, DIM)).astype(np.float32)
    rows = PAGE // 2 if codec == "int4" else PAGE
    empty = np.zeros((PAGES, KV_HEADS, rows, DIM), codes.DTYPES[codec])
    scales = np.zeros((PAGES, KV_HEADS, codes.scales_width(codec, PAGE, DIM)), jnp.bfloat16)
    every, nothing = np.arange(PAGES, dtype=np.int32), np.zeros_like(k_pages)
    coded = encode(empty, empty, scales, k_pages, v_pages, every, every)
    opened = reopen(nothing, nothing, *coded, every, every)
    counts, lengths = np.full((ROWS, 1), WIDTH, np.int32), np.asarray([WIDTH * PAGE, 70], np.int32)
    got = coded_decode(q, *coded, ids, counts, lengths)
    for a, b in zip(got, decode(q, *opened, ids, counts, lengths), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(got[0], decode(q, k_pages, v_pages, ids, counts, lengths)[0], atol=error)
