"""Measured configurations: what is measured, how the fastest is chosen, kept, and found again."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
import tune

from pallas_kernels import tuning
from pallas_kernels.mosaic_gpu import target
from pallas_kernels.mosaic_gpu.decode import Shape
from pallas_kernels.mosaic_gpu.split import Config
from pallas_kernels.mosaic_gpu.target import SHARED_BYTES

ENTRY = {
    "op": "paged_decode_attention",
    "stored": "bfloat16",
    "head_dim": 128,
    "page": 32,
    "pairs": 256,
    "tokens": 32768,
    "config": {"tile": 32, "stages": 3, "splits": 5, "least": 2},
}
SHAPE = Shape(rows=32, kv_heads=8, parts=1, lists=1, width=1024, page=32, head_dim=128)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "nvidia_h200.json").write_text(json.dumps([ENTRY]))
    return tmp_path


def test_a_near_entry_is_found_and_a_far_one_is_not(folder):
    def found(**changed):
        call = {k: v for k, v in ENTRY.items() if k != "config"} | changed
        return tuning.lookup(**call, kind="NVIDIA H200")

    assert found() == found(pairs=128, tokens=65536) == ENTRY["config"]
    assert found(pairs=32) is found(page=64) is found(stored="int8") is found(op="another") is None
    assert tuning.lookup("paged_decode_attention", "bfloat16", 128, 32, 256, 32768, kind="another") is None


def test_the_kernel_takes_what_was_measured_on_its_device(folder):
    dtype = jnp.dtype(jnp.bfloat16)
    with target.described("NVIDIA H200"):
        assert Config.measured("paged_decode_attention", dtype, SHAPE) == Config(**ENTRY["config"])
    with target.described("NVIDIA H100"):
        assert Config.measured("paged_decode_attention", dtype, SHAPE) is None
    with target.simulated():
        assert Config.measured("paged_decode_attention", dtype, SHAPE) is None


@pytest.mark.parametrize("op", ("paged_decode_attention", "quantized_decode_attention"))
def test_candidates_begin_with_the_heuristic_and_fit(op):
    of = jax.ShapeDtypeStruct
    q, ids = of((32, 32, 128), jnp.bfloat16), of((32, 1, 1024), jnp.int32)
    pool = of((9, 8, 32, 128), jnp.bfloat16 if op.startswith("paged") else jnp.int8)
    arguments = [q, pool, pool, ids, None, None]
    if op.startswith("quantized"):
        arguments.insert(3, of((9, 8, 160), jnp.bfloat16))
    first, *others = tune.candidates_of(op, arguments)
    assert first == tune.candidates_of(op, arguments)[0] and len(others) > 5 and first not in others
    if op.startswith("paged"):
        assert all(SHAPE.shared_bytes(c, 2) <= SHARED_BYTES for c in others)


def test_the_fastest_that_works_is_chosen():
    def measure(config):
        if config == "broken":
            raise ValueError("launch failed")
        return {"default": 2.0, "fast": 1.0, "slow": 3.0}[config]

    assert tune.best(["default", "broken", "fast", "slow"], measure, "x") == ("fast", 1.0, 2.0)
    with pytest.raises(ValueError, match="launch failed"):
        tune.best(["broken", "fast"], measure, "x")


def test_an_entry_replaces_the_one_for_the_same_call():
    newer, other = ENTRY | {"config": {}}, ENTRY | {"page": 64}
    assert tune.merged([ENTRY, other], newer) == [other, newer]
    assert tune.merged([ENTRY], None) == [ENTRY]


def test_there_is_nothing_to_tune_on_a_cpu(capsys):
    assert tune.main([]) == 2
    assert "need a CUDA GPU" in capsys.readouterr().err
