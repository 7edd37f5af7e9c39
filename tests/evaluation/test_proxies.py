"""Proxies: exact where everything is read, monotone in what is kept, bounded by the mass that is lost."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import EngineConfig
from sparsejax.cli import main
from sparsejax.errors import ConfigError
from sparsejax.evaluation import probe as driver
from sparsejax.evaluation import proxies
from sparsejax.evaluation.policies import DENSE, Policy
from sparsejax.models.loader import LoadedModel
from sparsejax.sparsity.policy import PRESETS
from tests.engine.models import random_prompts, tiny_model

TOKENS, STEPS, PAGE = 150, 6, 16
PROBED = [name for name in PRESETS if not driver.refusal(Policy(name))]
CONFIG = EngineConfig(page_size=PAGE, max_num_seqs=4, max_num_batched_tokens=64, num_decode_steps=1, warmup="none")


def random_case(seed: int, scale: float) -> tuple:
    """Queries [3, 4, 8], keys and values [20, 2, 8], what each query may see [3, 20], and a random order [3, 2, 20]."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 8), (20, 2, 8), (20, 2, 8)))
    visible = np.arange(20) < np.array([[11], [16], [20]])
    order = rng.permuted(np.tile(np.arange(20), (3, 2, 1)), axis=-1)
    return jnp.asarray(scale * q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(visible), order


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 8.0))
def test_recall_grows_with_what_is_kept_and_bounds_the_error(seed: int, scale: float) -> None:
    q, k, v, visible, order = random_case(seed, scale)
    dense = proxies.attention_weights(q, k, visible)
    exact = proxies.mixed(dense, v)
    np.testing.assert_allclose(dense.sum(-1), 1.0, rtol=1e-5)
    assert not dense[~jnp.broadcast_to(visible[:, None], dense.shape)].any()
    diameter = np.linalg.norm(np.asarray(v)[:, None] - np.asarray(v)[None], axis=-1).max((0, 1)).repeat(2)
    before = np.zeros((3, 4))
    for budget in (5, 10, 15, 20):
        weights, recall = proxies.restricted(dense, jnp.asarray(order < budget))
        moved = np.linalg.norm(proxies.mixed(weights, v) - exact, axis=-1)
        seen = np.asarray(recall) > 1e-6  # nothing visible kept leaves no distribution
        assert (moved[seen] <= ((1 - np.asarray(recall)) * diameter)[seen] + 1e-4).all()
        assert (recall >= before - 1e-6).all()
        before = recall
    np.testing.assert_allclose(recall, 1.0, rtol=1e-5)
    np.testing.assert_allclose(proxies.output_error(proxies.mixed(weights, v), exact), 0.0, atol=1e-5)


def test_a_soft_cap_flattens_attention() -> None:
    q, k, _, visible, _ = random_case(0, 8.0)
    capped, free = (proxies.attention_weights(q, k, visible, cap) for cap in (1.0, None))
    assert capped.max() < free.max()


def test_divergences() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]))
    np.testing.assert_allclose(proxies.divergence(logits, logits + 3.0), 0.0, atol=1e-6)
    expected = 0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.25 / 0.1)
    np.testing.assert_allclose(proxies.divergence(logits, logits[::-1])[0], expected, rtol=1e-5)
    assert proxies.first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert proxies.first_divergence([1, 2, 3], [1, 5, 3]) == 1


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def found(model: LoadedModel) -> dict[Policy, driver.Proxies]:
    """Every preset with a budget that covers the text, and with one that does not."""
    (tokens,) = random_prompts(11, (TOKENS,))
    policies = [Policy(name, budget) for name in PROBED for budget in (96, 4096)]
    results, refused = driver.probe(model, tokens, policies, steps=STEPS, config=CONFIG)
    assert not refused
    return {one.policy: one for one in results}


def test_budgets_that_cover_the_text_lose_nothing(found: dict[Policy, driver.Proxies]) -> None:
    for policy, one in found.items():
        assert one.recall.shape == one.error.shape and one.recall.shape[1] == len(one.divergence) == STEPS
        if policy.budget == 4096 or policy.preset == "dense":
            np.testing.assert_allclose(one.recall, 1.0, rtol=1e-5, err_msg=policy.label)
            np.testing.assert_allclose(one.error, 0.0, atol=1e-5, err_msg=policy.label)
            assert one.divergence.max() < 1e-6 and one.agreement == 1.0, policy.label
            assert one.first_divergence is None, policy.label


def test_less_is_kept_under_a_smaller_budget(found: dict[Policy, driver.Proxies]) -> None:
    # rkv first evicts later, and both layers of this model are omnikv's filter layers, which read everything.
    for name in set(PROBED) - {"dense", "rkv", "omnikv"}:
        one = found[Policy(name, 96)]
        assert 0.1 < one.recall.mean() < 0.999, name
        assert one.error.mean() > 1e-3 and 0 < one.divergences[0] <= one.divergences[1] <= one.divergences[2], name
    best = found[Policy("oracle", 96)].recall[0].mean()
    assert all(found[Policy(name, 96)].recall[0].mean() <= best + 1e-6 for name in ("window", "strided", "random"))


def test_dense_decoding_is_what_the_engine_computes(model: LoadedModel, found: dict[Policy, driver.Proxies]) -> None:
    """Teacher-forced logits of the probe give the engine's own greedy token after the prompt."""
    (tokens,) = random_prompts(11, (TOKENS,))
    (first,) = driver.greedy_replies(model, tokens[:-STEPS], [DENSE], 1, CONFIG)[DENSE]
    shape = driver._shape(model, TOKENS, PAGE)
    decoder = driver.Decoder(model.config, model.dtype)
    prompt = driver._read(decoder, shape, model.params, jnp.asarray(tokens[: -STEPS - 1]))
    kept = prompt.kept(PRESETS["dense"].keep)
    logits, _ = driver._decode(
        decoder, TOKENS - STEPS - 1, None, model.params, jnp.asarray(tokens[-STEPS - 1 : -STEPS]), prompt, kept, None
    )
    assert int(logits[0].argmax()) == first


def test_what_cannot_be_probed_says_so(model: LoadedModel) -> None:
    assert "stored as int8" in driver.refusal(Policy("int8"))
    assert "while the prompt is read" in driver.refusal(Policy("streaming"))
    assert "every query" in driver.refusal(Policy("h2o"))
    with pytest.raises(ConfigError, match="both parts need at least one token"):
        driver.probe(model, [1, 2, 3], [DENSE], steps=3)


@pytest.mark.slow
def test_the_command_prints_and_stores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text(" The magic number for apple is 617. box: 204; Copy 123 to lamp. Copy lamp to door." * 8)
    argv = ["eval", "--proxies", "--presets", "window", "--lengths", "160", "--steps", "4", "--budgets", "64"]
    engine = ["--page-size", "16", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--num-decode-steps", "1"]
    assert main([*argv, *engine, "--text", str(text), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "156 tokens read, 4 decoded" in printed and "window 64" in printed and "never" in printed
    (stored,) = json.loads(out.read_text())
    dense, window = stored["policies"]
    assert dense["agreement"] == 1.0 and dense["divergence"]["max"] < 1e-6 and len(window["recall"]) == 6
    assert min(window["recall"]) < 1.0
    assert main([*argv, "--text", str(text), "--lengths", "99999"]) == 2
    assert main(["eval", "--proxies"]) == 2
    assert "--text FILE" in capsys.readouterr().err
