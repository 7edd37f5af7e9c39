"""Properties of the XLA backend on drawn inputs: a row alone, and a prompt cut anywhere."""

from __future__ import annotations

import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import paged_decode_attention, paged_prefill_attention

ROWS, WIDTH, PAGE, HEADS, KV_HEADS, DIM, TOKENS = 3, 12, 16, 4, 2, 16, 160
decode = jax.jit(functools.partial(paged_decode_attention, implementation="xla", return_lse=True))
windowed = jax.jit(
    functools.partial(paged_decode_attention, implementation="xla", window=30, return_lse=True)
)
prefill = jax.jit(functools.partial(paged_prefill_attention, implementation="xla", window=70))

lengths = st.lists(st.integers(0, WIDTH * PAGE), min_size=ROWS, max_size=ROWS)


def _pools(rng: np.random.Generator):
    shape = (ROWS * WIDTH + 1, KV_HEADS, PAGE, DIM)
    pools = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
    ids = rng.permutation(np.arange(1, shape[0])).astype(np.int32).reshape(ROWS, 1, WIDTH)
    return *pools, ids


@settings(max_examples=25, deadline=None)
@given(lengths, st.integers(0, ROWS - 1), st.integers(0, 2**32 - 1))
def test_a_row_in_a_batch_is_the_row_alone(drawn, row, seed):
    rng = np.random.default_rng(seed)
    k_pages, v_pages, ids = _pools(rng)
    q = rng.standard_normal((ROWS, HEADS, DIM)).astype(np.float32)
    kept = np.asarray(drawn, np.int32)
    alone = np.where(np.arange(ROWS) == row, kept, 0).astype(np.int32)
    for op in (decode, windowed):
        together = op(q, k_pages, v_pages, ids, -(-kept[:, None] // PAGE), kept)
        single = op(q, k_pages, v_pages, ids, -(-alone[:, None] // PAGE), alone)
        for a, b in zip(together, single, strict=True):
            np.testing.assert_array_equal(a[row], b[row])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, TOKENS // 2), min_size=ROWS, max_size=ROWS).filter(lambda n: sum(n) <= TOKENS),
    st.lists(st.floats(0, 1), min_size=ROWS, max_size=ROWS),
    st.permutations(range(ROWS)),
    st.integers(0, 2**32 - 1),
)
def test_chunks_cut_and_ordered_in_any_way_agree(prompts, cuts, order, seed):
    rng = np.random.default_rng(seed)
    k_pages, v_pages, ids = _pools(rng)
    queries = [rng.standard_normal((n, HEADS, DIM)).astype(np.float32) for n in prompts]

    def run(rows, starts, stops):
        """One chunk: tokens starts[row] to stops[row] of these rows, in this order."""
        q = np.full((TOKENS, HEADS, DIM), np.nan, np.float32)
        used = np.concatenate([[0], np.cumsum([stops[r] - starts[r] for r in rows])]).astype(np.int32)
        for row, first, last in zip(rows, used, used[1:], strict=False):
            q[first:last] = queries[row][starts[row] : stops[row]]
        held = np.asarray([stops[r] for r in rows], np.int32)
        out = np.asarray(prefill(q, k_pages, v_pages, ids[list(rows)], -(-held[:, None] // PAGE), held, used))
        assert np.isfinite(out).all() and not out[used[-1] :].any()
        return {r: out[a:b] for r, a, b in zip(rows, used, used[1:], strict=False)}

    middle = [int(n * share) for n, share in zip(prompts, cuts, strict=True)]
    whole = run(range(ROWS), [0] * ROWS, prompts)
    first = run(order, [0] * ROWS, middle)
    second = run(order, middle, prompts)
    for row in range(ROWS):
        cut = np.concatenate([first[row], second[row]])
        np.testing.assert_allclose(cut, whole[row], atol=1e-5, rtol=1e-5)
