"""Loading: dtypes, sharding, memory, placement, and round trips through export and converted checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.errors import ConfigError, ModelError, StoreError
from sparsejax.models.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from sparsejax.models.config import DecoderConfig
from sparsejax.models.export import save_pretrained
from sparsejax.models.loader import load_config, load_model
from sparsejax.models.params import param_shapes
from tests.models.cases import CASES
from tests.models.tiny import write_checkpoint

SHARDED = "qwen3_gqa_untied_biases_llama3"
EXPORTED = ["llama_mqa_biases_gelu", "mistral_gqa_untied_window", "qwen2_gqa_tied", SHARDED]


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def ones(cfg):
    is_shape = {"is_leaf": lambda node: isinstance(node, tuple)}
    return jax.tree.map(lambda shape: np.ones(shape, np.float32), param_shapes(cfg), **is_shape)


def test_sharded_equals_single(tmp_path):
    sharded = load_model(write_checkpoint(tmp_path / "a", CASES[SHARDED]))
    single = load_model(write_checkpoint(tmp_path / "b", CASES[SHARDED] | {"shards": 1}))
    assert sharded.config == single.config
    assert_same(sharded.params, single.params)


def test_dtypes(tmp_path):
    stored = write_checkpoint(tmp_path, CASES["llama_mha_tied_linear"])  # bfloat16 on disk
    auto, wide = load_model(stored), load_model(stored, "float32")
    assert (auto.dtype, auto.params["embed"].dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (wide.dtype, wide.params["embed"].dtype) == (np.float32, np.float32)
    assert_same(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), auto.params), wide.params)
    assert load_model(stored, jnp.float16).dtype == np.float16
    with pytest.raises(ConfigError, match="'int8' is not supported; use one of auto, float32, bfloat16"):
        load_model(stored, "int8")


def test_dtype_of_the_tensors_when_the_config_is_silent(tmp_path):
    write_checkpoint(tmp_path, CASES["llama_mha_tied_linear"])
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_config(tmp_path).dtype is None
    assert load_model(tmp_path).config.dtype == "bfloat16"


def test_placement_sees_every_finished_array_once(tmp_path):
    seen = {}

    def place(path, array):
        assert path not in seen and array.flags.c_contiguous
        seen[path] = array
        return array

    model = load_model(write_checkpoint(tmp_path, CASES[SHARDED]), place=place)
    assert len(seen) == len(jax.tree.leaves(model.params))
    assert isinstance(model.params["embed"], np.ndarray)


def test_progress_bar_counts_bytes(tmp_path, capsys):
    load_model(write_checkpoint(tmp_path, CASES["llama_mha_untied"]), progress=True)
    assert "Loading weights: 100%" in capsys.readouterr().err


MEMORY_SCRIPT = """
import sys, tracemalloc
from pathlib import Path
from sparsejax.models.loader import load_model

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

load_model(sys.argv[1], "float32")
before = resident("VmRSS")
tracemalloc.start()
model = load_model(sys.argv[2], sys.argv[3])
print(resident("VmHWM") - before, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_model_and_one_shard(tmp_path, dtype):
    cfg = DecoderConfig(
        family="llama",
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=6,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
    )
    params = ones(cfg)
    save_pretrained(tmp_path / "big", cfg, params, max_shard_bytes=16 << 20)
    write_checkpoint(tmp_path / "small", CASES["llama_mha_untied"])
    shards = [file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")]
    assert len(shards) >= 5
    paths = [str(tmp_path / "small"), str(tmp_path / "big")]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, *paths, dtype],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    resident, heap = map(int, run.stdout.split())
    model = sum(leaf.size for leaf in jax.tree.leaves(params)) * np.dtype(getattr(jnp, dtype)).itemsize
    slack = 4 << 20
    assert heap <= model + slack
    assert resident <= model + max(shards) + slack


@pytest.mark.parametrize(
    "name", ["llama_mqa_biases_gelu", "mistral_gqa_untied_window", "qwen2_gqa_tied", SHARDED]
)
@pytest.mark.parametrize("limit", [None, 50_000])
def test_export_is_the_inverse_of_loading(tmp_path, name, limit):
    model = load_model(write_checkpoint(tmp_path / "a", CASES[name]))
    again = load_model(save_pretrained(tmp_path / "b", model.config, model.params, max_shard_bytes=limit))
    assert (limit is None) == (tmp_path / "b" / "model.safetensors").exists()
    assert again.config == model.config
    assert_same(again.params, model.params)
    original = read_all(tmp_path / "a")
    for tensor, array in read_all(tmp_path / "b").items():
        np.testing.assert_array_equal(array, original[tensor], tensor)


def read_all(path):
    from safetensors.numpy import load_file

    return {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def test_export_converts_and_refuses_what_the_format_cannot_say(tmp_path):
    cfg = DecoderConfig("llama", 32, 16, 16, 1, 2, 2, 8)
    params = ones(cfg)
    assert load_model(save_pretrained(tmp_path, cfg, params, "bfloat16")).dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match="llama format has no sliding window"):
        save_pretrained(tmp_path / "b", cfg.replace(windows=(4,)), params)


def test_converted_checkpoint_round_trip(tmp_path):
    source = write_checkpoint(tmp_path / "a", CASES[SHARDED])
    (source / "tokenizer.json").write_text("{}")
    model = load_model(source)
    path = save_checkpoint(tmp_path / "b", model.config, model.params, tokenizer_from=source)
    assert is_checkpoint(path) and not is_checkpoint(source)
    assert (path / "tokenizer.json").exists()
    again = load_model(path)
    assert (again.config, again.dtype, load_config(path)) == (model.config, model.dtype, model.config)
    assert_same(again.params, model.params)
    assert load_checkpoint(path, "bfloat16").params["embed"].dtype == jnp.bfloat16
    with pytest.raises(StoreError, match="overwrite=True"):
        save_checkpoint(path, model.config, model.params)
    save_checkpoint(path, model.config, jax.tree.map(jnp.zeros_like, model.params), overwrite=True)
    assert not np.asarray(load_model(path).params["embed"]).any()


def test_damaged_converted_checkpoint(tmp_path):
    model = load_model(write_checkpoint(tmp_path / "a", CASES["llama_mha_untied"]))
    path = save_checkpoint(tmp_path / "b", model.config, model.params)
    content = json.loads((path / "decoder.json").read_text())
    content["config"]["hidden_size"] *= 2
    (path / "decoder.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="damaged; convert it again"):
        load_model(path)
    (path / "decoder.json").write_text("{}")
    with pytest.raises(ModelError, match="decoder.json is damaged"):
        load_model(path)
    with pytest.raises(StoreError, match="not empty; give an empty directory"):
        save_checkpoint(tmp_path / "a", model.config, model.params)


def test_a_hub_id_is_downloaded_when_there_is_no_such_directory(tmp_path, monkeypatch):
    import huggingface_hub

    path = write_checkpoint(tmp_path, CASES["llama_mha_untied"])
    asked = []
    hub = types.SimpleNamespace(fetch=lambda hub_id, **options: asked.append(hub_id) or str(path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.fetch)
    assert load_model("someone/some-model").path == path
    assert asked == ["someone/some-model"]
