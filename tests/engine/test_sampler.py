"""Every transform against the NumPy oracle, draws by chi-square, rows independent of their batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.engine.params import SamplingParams
from sparsejax.engine.rows import mix_seed, neutral_row, pack_row, stack_rows
from sparsejax.engine.sampler import (
    SamplingRows,
    advance,
    draw_weights,
    edit_logits,
    sample,
    sample_greedy,
    score,
)
from tests.engine.sampling_oracle import edited, log_softmax, margin, probabilities

V, B = 203, 8
EOS = (7, 9)

_sample, _greedy = jax.jit(sample), jax.jit(sample_greedy)
_edit, _weights = jax.jit(edit_logits), jax.jit(draw_weights)


def device_rows(packed) -> SamplingRows:
    return SamplingRows(**{name: jnp.asarray(value) for name, value in stack_rows(packed).items()})


def one_row(params, prompt=(), output=(), seed=0, vocab=V, **extra):
    return pack_row(params, list(prompt), list(output), vocab, EOS, seed, **extra)


tokens = st.integers(0, V - 1)
token_lists = st.lists(tokens, max_size=12)


@st.composite
def sampling_params(draw):
    f = lambda low, high: draw(st.one_of(st.just(None), st.floats(low, high)))  # noqa: E731
    fields = {
        "temperature": draw(st.floats(0.05, 2.0)),
        "top_p": f(0.05, 1.0),
        "min_p": f(0.0, 0.5),
        "top_k": draw(st.sampled_from([None, 1, 2, 5, 40, V, 10_000])),
        "presence_penalty": f(-2, 2),
        "frequency_penalty": f(-2, 2),
        "repetition_penalty": f(0.3, 3),
        "logit_bias": draw(st.one_of(st.none(), st.dictionaries(tokens, st.floats(-20, 20), max_size=8))),
        "allowed_token_ids": draw(st.one_of(st.none(), st.lists(tokens, min_size=4, max_size=30))),
        "min_tokens": draw(st.integers(0, 6)),
        "stop_token_ids": draw(st.lists(tokens, max_size=2)),
    }
    return SamplingParams(max_tokens=64, **{k: v for k, v in fields.items() if v is not None})


@settings(max_examples=120, deadline=None)
@given(sampling_params(), token_lists, token_lists, st.integers(0, 2**32 - 1), st.floats(0.1, 8))
def test_row_matches_oracle(params, prompt, output, seed, spread):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(B, V)) * spread).astype(np.float32)
    never, banned = rng.integers(0, V, 2).tolist(), rng.integers(0, V, 3).tolist()
    packed = [neutral_row(V) for _ in range(B)]
    packed[seed % B] = one_row(params, prompt, output, seed, never=never, banned=banned)
    rows = device_rows(packed)
    row = logits[seed % B]
    expected = edited(row, params, prompt, output, params.all_stop_ids(EOS), never, banned)
    got = np.asarray(_edit(jnp.asarray(logits), rows))
    np.testing.assert_allclose(got[seed % B], expected, rtol=2e-5, atol=2e-5)
    others = np.arange(B) != seed % B
    np.testing.assert_array_equal(got[others], logits[others])

    weights = np.asarray(_weights(jnp.asarray(got), rows), np.float64)[seed % B]
    if margin(got[seed % B].astype(np.float64), params) > 1e-5:
        want = probabilities(got[seed % B].astype(np.float64), params)
        np.testing.assert_allclose(weights / weights.sum(), want, atol=2e-5)
        np.testing.assert_array_equal(weights > 1e-30, want > 1e-30)

    out = _sample(jnp.asarray(logits), rows)
    token = int(out.token[seed % B])
    assert weights[token] > 0
    for b in range(B):
        lp = log_softmax(logits[b])
        assert abs(float(out.logprob[b]) - lp[int(out.token[b])]) < 1e-4
        assert int(out.rank[b]) == 1 + (logits[b] > logits[b][int(out.token[b])]).sum()
        if b != seed % B:
            assert int(out.token[b]) == logits[b].argmax()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from([0.2, 0.5, 0.9, 0.999]))
def test_ties_are_kept_together(seed, k, p):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 4, size=(B, V)).astype(np.float32)
    logits[:, rng.integers(0, V, 20)] = rng.choice([0.0, -0.0], (B, 20))
    params = SamplingParams(top_k=k, top_p=p)
    rows = device_rows([one_row(params)] * B)
    kept = np.asarray(_weights(jnp.asarray(logits), rows)) > 0
    for b in range(B):
        want = probabilities(logits[b].astype(np.float64), params) > 0
        if margin(logits[b].astype(np.float64), params) > 1e-6:
            np.testing.assert_array_equal(kept[b], want)


def test_greedy_is_the_plain_part_of_sample():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(B, V)) * 4, jnp.float32)
    logits = logits.at[0, 5].set(50.0).at[0, 3].set(50.0)
    greedy = _greedy(logits)
    full = _sample(logits, device_rows([one_row(SamplingParams(temperature=0))] * B))
    np.testing.assert_array_equal(greedy.token, np.asarray(logits).argmax(-1))
    for name in ("token", "logprob", "rank"):
        np.testing.assert_array_equal(getattr(greedy, name), getattr(full, name))
    assert greedy.top_ids is None and int(full.top_ids.max()) == -1


def test_top_logprobs_and_score():
    logits = np.random.default_rng(1).normal(size=(B, V)).astype(np.float32) * 3
    rows = device_rows([one_row(SamplingParams(temperature=0, logprobs=5))] * B)
    out = _sample(jnp.asarray(logits), rows)
    given = np.arange(B, dtype=np.int32)
    scored = jax.jit(score)(jnp.asarray(logits), given, jnp.full(B, 20, jnp.int32))
    for b in range(B):
        lp = log_softmax(logits[b])
        order = np.argsort(-logits[b], kind="stable")[:20]
        np.testing.assert_array_equal(out.top_ids[b], order)
        np.testing.assert_allclose(out.top_logprobs[b], lp[order], atol=1e-4)
        np.testing.assert_allclose(scored.logprob[b], lp[b], atol=1e-4)
        assert int(scored.rank[b]) == 1 + (logits[b] > logits[b, b]).sum()


def test_tiny_vocabulary_pads_alternatives():
    logits = jnp.asarray([[0.0, 2.0, 1.0]], jnp.float32)
    row = pack_row(SamplingParams(temperature=0, logprobs=20), [], [], 3, (), 0)
    out = _sample(logits, device_rows([row]))
    assert out.top_ids[0].tolist() == [1, 2, 0] + [-1] * 17
    assert np.isneginf(np.asarray(out.top_logprobs)[0, 3:]).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_and_fully_masked_rows(temperature):
    """Nothing crashes, a broken row says so, its neighbours do not notice."""
    good = np.random.default_rng(2).normal(size=(B, V)).astype(np.float32)
    bad = good.copy()
    bad[0] = np.nan
    bad[1] = -np.inf
    bad[2, 3:] = np.nan
    bad[3, 11] = np.inf
    params = SamplingParams(temperature=temperature, top_k=20, top_p=0.9)
    masked = SamplingParams(temperature=temperature, allowed_token_ids=[4])
    packed = [one_row(params, seed=b) for b in range(B)]
    packed[4] = one_row(masked, banned=[4])
    want = _sample(jnp.asarray(good), device_rows(packed))
    out = _sample(jnp.asarray(bad), device_rows(packed))
    assert np.isneginf(np.asarray(out.logprob)[:2]).all()
    assert np.isfinite(np.asarray(out.logprob)[2:]).all()
    assert int(out.token[2]) < 3 and int(out.token[3]) == 11
    assert np.all((0 <= np.asarray(out.token)) & (np.asarray(out.token) < V))
    np.testing.assert_array_equal(out.token[4:], want.token[4:])
    if temperature == 0:
        assert int(out.token[4]) == good[4].argmax()
        assert np.isneginf(np.asarray(_greedy(jnp.asarray(bad)).logprob)[:2]).all()


FILTERS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.05},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_draws_follow_the_distribution(fields):
    """Chi-square at 1e-6 over 24,000 seeds of one row: fixed seeds, so the verdict is always the same."""
    n, vocab = 24_000, 40
    params = SamplingParams(**fields)
    logits = np.random.default_rng(3).normal(size=vocab).astype(np.float32) * 1.5
    base = pack_row(params, [], [], vocab, (), 0)
    rows = {name: np.broadcast_to(value, (n, *value.shape)) for name, value in base.items()}
    rows["seed"] = np.arange(n, dtype=np.uint32)
    rows = SamplingRows(**{name: jnp.asarray(value) for name, value in rows.items()})
    drawn = np.asarray(_sample(jnp.broadcast_to(logits, (n, vocab)), rows).token)
    p = probabilities(logits.astype(np.float64), params)
    counts = np.bincount(drawn, minlength=vocab)
    assert (counts[p == 0] == 0).all()
    expected = p[p > 0] * n
    seen = counts[p > 0]
    rare = expected < 5
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        seen = np.append(seen[~rare], seen[rare].sum())
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # Wilson-Hilferty: the cube root of chi-square over its freedom is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert z < 4.75


def test_steps_of_one_seed_follow_the_distribution():
    """The stream of a single request is as random as many requests."""
    n, vocab, faces = 24_000, 40, 8
    base = pack_row(SamplingParams(), [], [], vocab, (), 123)
    rows = {name: np.broadcast_to(value, (n, *value.shape)) for name, value in base.items()}
    rows["step"] = np.arange(n, dtype=np.int32)
    rows = SamplingRows(**{name: jnp.asarray(value) for name, value in rows.items()})
    logits = jnp.broadcast_to(jnp.where(jnp.arange(vocab) < faces, 0.0, -jnp.inf), (n, vocab))
    drawn = np.asarray(_sample(logits, rows).token)
    pairs = np.bincount(drawn[:-1] * faces + drawn[1:], minlength=faces * faces)
    expected = (n - 1) / faces**2
    assert ((pairs - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63)


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.7},
    {"top_k": 30},
    {"top_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.01},
    {"presence_penalty": 1.0, "repetition_penalty": 1.3},
    {"logit_bias": {3: 5.0}, "min_tokens": 9},
]


@pytest.mark.parametrize(("vocab", "sizes"), [(1003, (1, 5, 16)), (32_000, (4, 16))], ids=str)
def test_a_row_does_not_depend_on_its_batch(vocab, sizes):
    """The same token alone and anywhere in batches of mixed neighbours, whatever the batch size."""
    rng = np.random.default_rng(4)
    count = 16
    logits = (rng.normal(size=(count, vocab)) * 3).astype(np.float32)
    packed = []
    for b in range(count):
        params = SamplingParams(max_tokens=64, **MIXED[b % len(MIXED)])
        history = rng.integers(0, vocab, 6).tolist()
        packed.append(pack_row(params, history[:3], history[3:], vocab, EOS, 1000 + b))
    whole = _sample(jnp.asarray(logits), device_rows(packed))
    order = rng.permutation(count)
    for size in sizes:
        for start in range(0, count, size) if size > 1 else range(0, count, 3):
            chosen = order[start : start + size]
            if len(chosen) < size:
                continue
            part = _sample(jnp.asarray(logits[chosen]), device_rows([packed[b] for b in chosen]))
            for name in ("token", "rank"):
                got, want = np.asarray(getattr(part, name)), np.asarray(getattr(whole, name))[chosen]
                np.testing.assert_array_equal(got, want, err_msg=f"{name}, batch of {size}")
            # The log of a float sum: its order, and so its last bit, is the compiler's choice per shape.
            np.testing.assert_allclose(part.logprob, np.asarray(whole.logprob)[chosen], rtol=2e-6)


def test_seed_and_step_decide_the_draw():
    logits = jnp.zeros((B, V))
    draws = {}
    for seed in (1, 2, 2**32 - 1):
        for length in (0, 1):
            row = one_row(SamplingParams(seed=seed), output=[5] * length, seed=seed)
            draws[seed, length] = int(_sample(logits, device_rows([row] * B)).token[0])
    assert len(set(draws.values())) > 3
    assert mix_seed(7) == 7 and len({mix_seed(s, i) for s in range(50) for i in range(50)}) == 2500
    assert 0 <= mix_seed(-(2**62)) < 2**32


def test_advance_counts_active_rows():
    rows = device_rows([one_row(SamplingParams(presence_penalty=1.0), output=[5])] * B)
    token = jnp.arange(B, dtype=jnp.int32)
    active = token % 2 == 0
    after = jax.jit(advance)(rows, token, active)
    assert after.step.tolist() == [2, 1] * (B // 2)
    counts = np.asarray(after.output_counts)
    assert counts[:, 5].tolist() == [1] * B and counts.sum() == B + B // 2
    assert counts[4, 4] == 1 and counts[3, 3] == 0


def test_one_program_serves_every_mix():
    logits = jnp.zeros((B, V))
    sizes = set()
    for start in range(len(MIXED)):
        packed = [one_row(SamplingParams(max_tokens=64, **MIXED[(start + b) % len(MIXED)])) for b in range(B)]
        _sample(logits, device_rows(packed))
        sizes.add(_sample._cache_size())
    assert len(sizes) == 1
