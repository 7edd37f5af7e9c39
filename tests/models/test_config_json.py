"""Reading config.json: old and new spellings, defaults, and errors that name the field."""

from __future__ import annotations

import json

import pytest

from sparsejax.errors import ModelError
from sparsejax.models.families import FAMILIES, family_named
from sparsejax.models.families.base import encode_common
from sparsejax.models.loader import load_config
from tests.models.cases import CASES
from tests.models.tiny import config_json

LLAMA = config_json(CASES["llama_gqa_tied_llama3"])


def config(tmp_path, raw, generation=None):
    (tmp_path / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return load_config(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_encode_is_the_inverse_of_decode(name, tmp_path):
    cfg = config(tmp_path, config_json(CASES[name]))
    family = family_named(cfg.family)
    again = json.loads(json.dumps(encode_common(cfg) | family.encode(cfg) | {"dtype": cfg.dtype}))
    assert family.decode(again) == cfg


def test_old_and_new_rope_spellings_agree(tmp_path):
    table = {**LLAMA["rope_scaling"], "rope_theta": LLAMA["rope_theta"]}
    new = {key: value for key, value in LLAMA.items() if key not in ("rope_scaling", "rope_theta")}
    old_cfg = config(tmp_path, LLAMA)
    assert old_cfg == config(tmp_path, new | {"rope_parameters": table})
    assert old_cfg == config(tmp_path, new | {"rope_parameters": {"full_attention": table}})
    assert old_cfg.rope.theta == 500000.0
    assert old_cfg.dtype == "float32"


def test_yarn_takes_absent_values_from_the_context_lengths(tmp_path):
    scaling = {"type": "yarn", "original_max_position_embeddings": 64, "beta_fast": None}
    rope = config(tmp_path, LLAMA | {"rope_scaling": scaling, "max_position_embeddings": 512}).rope
    assert (rope.factor, rope.original_max_position, rope.beta_fast) == (8.0, 64, 32.0)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, (None,) * 3),
        ({"use_sliding_window": True, "max_window_layers": 2}, (None, None, 16)),
        ({"use_sliding_window": True, "max_window_layers": 3}, (None,) * 3),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, (None,) * 3),
        (
            {
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (16, None, None),
        ),
        ({"layer_types": ["sliding_attention"] * 3}, (None,) * 3),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows(tmp_path, family, changes, windows):
    raw = config_json(CASES["qwen2_mha_untied_window"]) | {"use_sliding_window": False, "sliding_window": 16}
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    assert config(tmp_path, raw | {"architectures": [architecture]} | changes).windows == windows


def test_family_defaults_for_absent_keys(tmp_path):
    raw = config_json(CASES["mistral_gqa_untied_window"])
    for key in ("sliding_window", "num_key_value_heads", "head_dim"):
        raw.pop(key)
    cfg = config(tmp_path, raw | {"num_attention_heads": 16})
    assert (cfg.windows, cfg.num_kv_heads, cfg.head_dim) == ((4096, 4096), 8, 8)
    raw = config_json(CASES["qwen3_gqa_tied"]) | {"head_dim": None}
    assert config(tmp_path, raw).head_dim == 128


def test_end_of_text_ids(tmp_path):
    assert config(tmp_path, LLAMA | {"eos_token_id": 2}).eos_token_ids == (2,)
    assert config(tmp_path, LLAMA | {"eos_token_id": [2, 5]}).eos_token_ids == (2, 5)
    assert config(tmp_path, LLAMA | {"eos_token_id": 2}, {"eos_token_id": [7, 2]}).eos_token_ids == (7, 2)
    assert config(tmp_path, LLAMA | {"eos_token_id": 2}, {"do_sample": True}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "known architectures: .*LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"architectures": None}, "names no architectures"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; known: .*silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported; known"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number, got '2'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized checkpoints"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
    ],
)
def test_bad_values_are_named(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message) as error:
        config(tmp_path, LLAMA | changes)
    assert "config.json" in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ModelError, match="config.json is missing; the directory holds: nothing"):
        load_config(tmp_path)
    with pytest.raises(ModelError, match="not valid JSON"):
        config(tmp_path, '{"hidden_size": ')
    with pytest.raises(ModelError, match="must hold a JSON object, got list"):
        config(tmp_path, "[]")


def test_no_two_families_claim_an_architecture():
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(names) == len(set(names))
