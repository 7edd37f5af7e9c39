"""Damaged checkpoints: every problem is named, with what to do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sparsejax.errors import ModelError
from sparsejax.models.loaded import nonfinite_tensors
from sparsejax.models.loader import load_model
from sparsejax.models.tokenizer import load_tokenizer
from tests.models.cases import CASES
from tests.models.tiny import config_json, save_safetensors, tensors, write_checkpoint

TIED = CASES["llama_gqa_tied_llama3"] | {"shards": 1}
SHARDED = CASES["mistral_gqa_untied_window"]
Q = "model.layers.1.self_attn.q_proj.weight"


def write(tmp_path, change):
    weights = tensors(TIED)
    change(weights)
    (tmp_path / "config.json").write_text(json.dumps(config_json(TIED)))
    save_safetensors(tmp_path / "model.safetensors", weights)
    return tmp_path


def error_of(path, **options):
    with pytest.raises(ModelError) as error:
        load_model(path, **options)
    return str(error.value)


def test_every_missing_extra_and_misshaped_tensor_is_named(tmp_path):
    def change(weights):
        del weights["model.norm.weight"], weights["model.layers.0.mlp.up_proj.weight"]
        weights[Q] = weights[Q][:-1]
        weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        weights["model.layers.0.mlp.down_proj.weight"] = np.zeros((256, 96), np.int32)

    message = error_of(write(tmp_path, change))
    assert "2 tensors missing" in message
    assert "model.norm.weight" in message and "model.layers.0.mlp.up_proj.weight" in message
    assert f"{Q} has (255, 256), expected (256, 256)" in message
    assert "1 tensors not part of this architecture:\n  model.layers.2.mlp.up_proj.weight" in message
    assert "model.layers.0.mlp.down_proj.weight is I32" in message and "F64, F32, F16, BF16" in message


def test_harmless_extra_tensors_are_ignored(tmp_path):
    def change(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
        weights["lm_head.weight"] = np.full((128, 256), np.nan, np.float32)

    model = load_model(write(tmp_path, change), check_finite=True)
    assert "lm_head" not in model.params


def test_nan_weights_on_request(tmp_path):
    def change(weights):
        weights[Q][3, :5] = np.nan
        weights["model.embed_tokens.weight"][0, 0] = np.inf

    path = write(tmp_path, change)
    assert nonfinite_tensors(load_model(path).params) == {"embed": 1, "layers_1/qkv": 5}
    message = error_of(path, check_finite=True)
    assert "layers_1/qkv: 5 values" in message and "embed: 1 values" in message


@pytest.mark.parametrize("keep", [0, 5, 100, 4000, -8])
def test_truncated_file(tmp_path, keep):
    file = write(tmp_path, lambda weights: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = error_of(tmp_path)
    assert "model.safetensors is truncated" in message and "download it again" in message
    if keep == -8:
        assert "1 tensors are cut (model.norm.weight)" in message


def test_damaged_header(tmp_path):
    file = write(tmp_path, lambda weights: None) / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:8] + b"x" + good[9:])
    assert "damaged safetensors header" in error_of(tmp_path)
    file.write_bytes(good.replace(b'"shape": [128, 256]', b'"shape": [128, 255]', 1))
    assert "'model.embed_tokens.weight' has the wrong number of bytes" in error_of(tmp_path)


def test_missing_shards_are_named(tmp_path):
    write_checkpoint(tmp_path, SHARDED)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "lacks 1 of 2 shards: model-00002-of-00002.safetensors" in error_of(tmp_path)


def test_index_and_shards_disagree(tmp_path):
    write_checkpoint(tmp_path, SHARDED)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = content["weight_map"]["model.norm.weight"]
    other = next(file for file in set(content["weight_map"].values()) if file != moved)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"model.norm.weight": other}}))
    assert f"model.norm.weight (in {other})" in error_of(tmp_path)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    assert "lacks 1 of 1 shards" in error_of(tmp_path)
    index.write_text("{}")
    assert "lacks a 'weight_map'" in error_of(tmp_path)
    index.write_text("{")
    assert "not valid JSON" in error_of(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    write_checkpoint(tmp_path, SHARDED)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[1].write_bytes(files[0].read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    held = [name for name, file in names.items() if file == files[0].name]
    halves = {name: files[i % 2].name for i, name in enumerate(held)}
    index.write_text(json.dumps({"weight_map": halves}))
    assert "is in two shards" in error_of(tmp_path)


def test_other_weight_formats(tmp_path):
    write(tmp_path, lambda weights: None)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = error_of(tmp_path)
    assert "it holds: config.json, pytorch_model.bin" in message and "converted to safetensors" in message


def test_paths_that_are_no_models(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    (tmp_path / "file").write_text("")
    assert "is a file; give the directory" in error_of(tmp_path / "file")
    assert "not a hub id" in error_of(tmp_path / "absent")

    def failing(error):
        def download(*args, **options):
            raise error

        return download

    offline = [errors.HTTPError("no route"), errors.LocalEntryNotFoundError("not cached"), OSError("disk")]
    for error in offline:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
        assert "hub cannot be reached" in error_of("someone/some-model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(errors.HFValidationError("bad name")))
    assert "no such model" in error_of("someone/some-model")


def test_tokenizers(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer .*tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_with_a_chat_template(tmp_path):
    vocab = {"<unk>": 0, "hello": 1, "user": 2}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello") == [1]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "user hello"
