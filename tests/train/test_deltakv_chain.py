"""The documented command, from the embedded model to a compressor that an engine serves."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparsejax.cache.codecs.compressor import fingerprint, load_compressor, read_shapes
from sparsejax.cache.plan import Plan, cache_bytes
from sparsejax.models.files import EMBEDDED
from sparsejax.models.loader import load_model
from train import deltakv

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "deltakv.md"
SMALL = "--sequences 6 --length 128 --layer-steps 2 --model-steps 2 --cases kv_dense --eval-length 128 --samples 1"
RATES = "--rates 8 16 32 48 --rate-codecs int4 int8"


def documented() -> list[str]:
    """The arguments of the page's command for the embedded model."""
    text = DOCS.read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if "python -m train.deltakv --out runs/trained" in line)
    return shlex.split(line.strip())[3:]


@pytest.mark.slow
def test_the_documented_command_ends_with_a_compressor_and_tables(tmp_path, monkeypatch):
    """With a width and a codec for each layer, too, in the bytes of the documented width for all."""
    arguments = [*documented(), *shlex.split(f"{SMALL} {RATES}"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["deltakv", *arguments])
    deltakv.main()
    model = load_model(EMBEDDED)
    made = load_compressor(tmp_path / "export", model.config, fingerprint(model.params))
    assert made.sparse == (2, 3, 4, 5)
    found = json.loads((tmp_path / "answers.json").read_text())
    rows = {(row["compressor"], row["visibility"]) for row in found["rows"]}
    assert rows >= {("none", "dense"), ("trained", "sealed")}
    assert found["share_of_bytes"] < 0.2
    plan = Plan.of(*read_shapes(tmp_path / "export"), 6)
    layers = json.loads((tmp_path / "report.json").read_text())["layers"]
    uniform = cache_bytes(model.config, Plan(plan.grid, 32, (0, 1)), 131072)["total"]
    assert cache_bytes(model.config, plan, 131072)["total"] <= uniform
    stored = {row["layer"]: (row["width"], row["codec"]) for row in layers if row["role"] == "sparse"}
    assert stored == {i: (width, plan.grids(6)[i].latents) for i, width in plan.widths(6).items()}
    assert all(0 < row["coverage"] <= 1 for row in layers)
    assert all((row["trained"] is not None) == (row["layer"] in stored) for row in layers)
    assert (tmp_path / "loss.svg").exists() and (tmp_path / "log.csv").exists()


@pytest.mark.slow
def test_two_devices_train_what_one_does(tmp_path):
    """In a process of its own, which pretends to have two."""
    settings = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    script = [sys.executable, "-m", "tests.train.two_devices", str(tmp_path)]
    done = subprocess.run(script, env=settings, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
