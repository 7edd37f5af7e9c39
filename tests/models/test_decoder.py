"""The decoder and plain causal attention: shapes, dtypes, causality, windows, segments, soft caps."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.decoder import Decoder
from sparsejax.models.dense import DenseCausal
from sparsejax.models.params import init_params, param_count, param_shapes

CFG = DecoderConfig(
    family="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
TOKENS = np.random.default_rng(0).integers(0, 40, 12)


def batch(tokens, positions):
    return types.SimpleNamespace(tokens=jnp.asarray(tokens), positions=jnp.asarray(positions))


def hidden(cfg, tokens, *, kv=None, positions=None, dtype=jnp.float32):
    params = init_params(cfg, jax.random.key(1), dtype, std=0.3)
    kv = kv or DenseCausal.of(cfg)
    positions = np.arange(len(tokens)) if positions is None else positions

    @jax.jit
    def run(params, tokens, positions):
        return Decoder(cfg, dtype).apply({"params": params}, batch(tokens, positions), kv)[0]

    return np.asarray(run(params, tokens, positions).astype(jnp.float32))


def test_dtypes_and_shapes():
    decoder = Decoder(CFG, jnp.bfloat16)
    params = init_params(CFG, 0, jnp.bfloat16)

    def run(params):
        out, kv = decoder.apply({"params": params}, batch(TOKENS, np.arange(12)), DenseCausal())
        return out, kv, decoder.apply({"params": params}, out[-1:], method="logits")

    out, kv, logits = jax.eval_shape(run, params)
    assert (out.shape, out.dtype, kv) == ((12, 16), jnp.bfloat16, DenseCausal())
    assert (logits.shape, logits.dtype) == ((1, 40), jnp.float32)
    assert param_count(CFG) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_tree_of_the_module_is_the_declared_one():
    cfg = CFG.replace(
        num_layers=2, windows=(), qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, tie_embeddings=True
    )
    key, inputs = jax.random.key(0), batch(TOKENS, np.arange(12))
    made = jax.eval_shape(lambda: Decoder(cfg).init(key, inputs, DenseCausal()))["params"]
    for tree in (made, init_params(cfg, 0)):
        assert jax.tree.map(lambda leaf: leaf.shape, tree) == param_shapes(cfg)
        assert "lm_head" not in tree


def test_random_parameters_are_reproducible():
    cfg = CFG.replace(num_layers=2, windows=())
    one, same, other = (init_params(cfg, rng) for rng in (jax.random.key(3), jax.random.key(3), 4))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one["embed"], other["embed"])
    assert np.std(one["layers_0"]["qkv"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(one["layers_1"]["down"]) == pytest.approx(0.01, rel=0.1)
    assert not np.array_equal(one["layers_0"]["o"], one["layers_1"]["o"])


def test_later_tokens_do_not_reach_back():
    changed = TOKENS.copy()
    changed[7] = (changed[7] + 1) % 40
    before, after = hidden(CFG, TOKENS), hidden(CFG, changed)
    np.testing.assert_array_equal(before[:7], after[:7])
    assert not np.array_equal(before[7:], after[7:])


def test_window_hides_tokens_that_are_older():
    cfg = CFG.replace(windows=(3,))
    changed = TOKENS.copy()
    changed[4] = (changed[4] + 1) % 40
    differs = np.abs(hidden(cfg, TOKENS) - hidden(cfg, changed)).max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(differs), [4, 5, 6])


def test_segments_are_separate_sequences():
    positions = np.tile(np.arange(6), 2)
    both = hidden(CFG, TOKENS, kv=DenseCausal(6), positions=positions)
    alone = hidden(CFG, TOKENS[6:])
    np.testing.assert_allclose(both[6:], alone, atol=1e-5)
    with pytest.raises(ConfigError, match="12 tokens do not divide into segments of 5"):
        hidden(CFG, TOKENS, kv=DenseCausal(5))


def test_soft_caps_bound_logits_and_change_scores():
    capped = CFG.replace(final_soft_cap=0.5, attn_soft_cap=0.1)
    assert not np.allclose(hidden(CFG, TOKENS), hidden(capped, TOKENS))
    params = init_params(capped, jax.random.key(1), std=2.0)
    logits = Decoder(capped).apply({"params": params}, jnp.ones((1, 16)), method="logits")
    assert float(jnp.abs(logits).max()) <= 0.5


def test_kv_object_sees_unrotated_keys_and_a_rotation():
    seen = []

    class Spy:
        def attend(self, layer, q, k, v, batch, rotate):
            seen.append((layer, q.shape, k.shape, v.shape))
            np.testing.assert_allclose(rotate(k)[0], k[0], atol=1e-6)
            assert not np.allclose(rotate(k)[1:], k[1:])
            return q, self

    cfg = CFG.replace(num_layers=2, windows=())
    Decoder(cfg).apply({"params": init_params(cfg, 0)}, batch(TOKENS, np.arange(12)), Spy())
    assert seen == [(i, (12, 4, 8), (12, 2, 8), (12, 2, 8)) for i in range(2)]


def test_gradients_flow_to_every_parameter():
    params = init_params(CFG, jax.random.key(0))

    def loss(params):
        decoder = Decoder(CFG)
        out, _ = decoder.apply({"params": params}, batch(TOKENS, np.tile(np.arange(6), 2)), DenseCausal(6))
        return decoder.apply({"params": params}, out, method="logits").std()

    for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(grad).all() and np.any(grad != 0), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 7}, "even"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"vocab_size": True}, "vocab_size must be a positive integer"),
        ({"windows": (4, 4)}, "one entry per layer"),
        ({"windows": (0,)}, "sliding window must be a positive integer"),
        ({"activation": "relu"}, "known: silu, gelu, gelu_tanh"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        CFG.replace(**changes)


def test_configurations_are_hashable_and_compare_by_value():
    assert hash(CFG) == hash(CFG.replace(num_layers=1))
    assert CFG.windows == (None,)
