"""`doctor` and `memory` on a tiny checkpoint: what they find, what they say to do, and what they return."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmarks import random_model
from packaging.requirements import Requirement
from safetensors.numpy import load_file, save_file

from sparsejax.cli import checks, main

WEIGHTS = 2 * (2 * 256 * 64 + 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64))
PAGE = 2 * 2 * 2 * 16 * 32 * 2  # layers, K and V, KV heads, head dim, tokens, bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model.write(random_model.TINY, "bfloat16", tmp_path_factory.mktemp("models"))


def doctor(capsys, *argv: str) -> tuple[int, dict[str, list[dict]]]:
    """The status and the checks by name."""
    status = main(["doctor", "--json", *argv])
    found: dict[str, list[dict]] = {}
    for check in json.loads(capsys.readouterr().out)["checks"]:
        found.setdefault(check["name"], []).append(check)
    return status, found


def test_a_good_machine_passes(capsys, model, tmp_path):
    cache = tmp_path / "cache"
    status, found = doctor(capsys, "--model", str(model), "--check-nan", "--compile-cache-dir", str(cache))
    assert status == 0
    assert "every weight is finite" in found["model"][0]["detail"]
    assert found["compile cache"][0]["detail"].startswith(str(cache))
    assert found["tokenizer"][0]["status"] == "note"
    operations = " ".join(check["detail"] for check in found["operation"])
    for name in ("kv_write", "paged_decode_attention", "paged_prefill_attention"):
        assert f"{name}: xla (mosaic_gpu: " in operations


def test_nan_weights_are_found_on_request(capsys, model, tmp_path):
    tensors = dict(load_file(model / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert doctor(capsys, "--model", str(tmp_path))[0] == 0
    status, found = doctor(capsys, "--model", str(tmp_path), "--check-nan")
    assert status == 1 and "layers_1/gate_up: 1 values" in found["model"][0]["detail"]


def test_what_is_wrong_fails_with_a_fix(capsys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    argv = ("--model", str(tmp_path / "absent"), "--compile-cache-dir", str(blocked / "cache"))
    status, found = doctor(capsys, *argv)
    assert status == 1
    assert found["compile cache"][0]["status"] == found["model"][0]["status"] == "fail"
    assert "--compile-cache-dir" in found["compile cache"][0]["fix"]
    assert "tokenizer" not in found


def test_a_bad_setting_is_one_failed_check(capsys):
    status, found = doctor(capsys, "--page-size", "7")
    assert status == 1 and "page_size=7" in found["settings"][0]["detail"]


def test_an_extra_needs_what_its_extras_need(monkeypatch):
    known = [(Requirement("jax[cuda13]"), "cuda"), (Requirement("jax"), "plain")]
    monkeypatch.setattr(checks, "requirements", lambda: iter(known))
    monkeypatch.setattr(checks, "installed", lambda name: "1" if name == "jax" else None)
    assert next(checks.extras()).detail == "installed: plain; not installed: cuda"


def test_memory_counts_bytes_and_sequences(capsys, model):
    argv = ["memory", "--model", str(model), "--json", "--length", "32", "--length", "100"]
    assert main([*argv, "--kv-memory-bytes", str(9 * PAGE)]) == 0
    need = json.loads(capsys.readouterr().out)
    assert (need["weights"], need["page_bytes"], need["dtype"]) == (WEIGHTS, PAGE, "bfloat16")
    assert need["sequences"] == {"32": 8, "100": 2}
    assert need["kv_bytes_per_token"] == PAGE // 32


def test_memory_counts_pages_as_a_platform_lays_them_out(capsys, model):
    """A TPU keeps K and V of 16 dimensions side by side in 128 lanes."""
    for platform, times in (("cpu", 1), ("gpu", 1), ("tpu", 4)):
        assert main(["memory", "--model", str(model), "--json", "--platform", platform]) == 0
        assert json.loads(capsys.readouterr().out)["page_bytes"] == times * PAGE
    latents = ["--sparsity", "deltakv", "--latent", "16", "--filter-layers", "0", "--length", "64"]
    found = {}
    for platform in ("gpu", "tpu"):
        assert main(["memory", "--model", str(model), "--json", "--platform", platform, *latents]) == 0
        found[platform] = json.loads(capsys.readouterr().out)["parts"]
    assert found["tpu"]["references"] > found["gpu"]["references"]


def test_memory_says_when_nothing_fits(capsys, model):
    assert main(["memory", "--model", str(model), "--kv-memory-bytes", "1000"]) == 0
    text = capsys.readouterr().out
    assert "2,048 tokens" in text and "Where none fits" in text


def test_the_tiers_of_pages_are_looked_at(capsys, tmp_path):
    kept = tmp_path / "kv" / "ab"
    kept.mkdir(parents=True)
    (kept / ("ab" * 32 + ".page")).write_bytes(bytes(3 << 20))
    flags = ("--no-model", "--host-kv-bytes", "1MiB", "--disk-kv-path", str(tmp_path / "kv"), "--disk-kv-bytes")
    tiers = doctor(capsys, *flags, "8MiB")[1]["page tiers"][0]
    assert tiers["status"] == "ok" and "3.0 MiB of 8.0 MiB" in tiers["detail"]
    tiers = doctor(capsys, *flags, "9000TiB")[1]["page tiers"][0]
    assert tiers["status"] == "note" and "lower --disk-kv-bytes" in tiers["fix"]
    assert "none" in doctor(capsys, "--no-model")[1]["page tiers"][0]["detail"]
