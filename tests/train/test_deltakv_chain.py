"""The documented command, from the embedded model to a compressor that an engine serves."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from sparsejax.cache.codecs.compressor import fingerprint, load_compressor
from sparsejax.models.files import EMBEDDED
from sparsejax.models.loader import load_model
from train import deltakv

DOCS = Path(__file__).resolve().parents[2] / "docs" / "deltakv.md"
SMALL = "--sequences 6 --length 64 --layer-steps 2 --model-steps 2 --cases kv_dense --eval-length 96 --samples 1"


def documented() -> list[str]:
    """The arguments of the page's command for the embedded model."""
    text = DOCS.read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if "python -m train.deltakv --out runs/trained" in line)
    return shlex.split(line.strip())[3:]


@pytest.mark.slow
def test_the_documented_command_ends_with_a_compressor_and_a_table(tmp_path, monkeypatch):
    arguments = [*documented(), *shlex.split(SMALL), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["deltakv", *arguments])
    deltakv.main()
    model = load_model(EMBEDDED)
    made = load_compressor(tmp_path / "export", model.config, fingerprint(model.params))
    assert made.sparse == (2, 3, 4, 5)
    found = json.loads((tmp_path / "answers.json").read_text())
    rows = {(row["compressor"], row["visibility"]) for row in found["rows"]}
    assert rows >= {("none", "dense"), ("trained", "sealed")}
    assert found["share_of_bytes"] < 0.2
    assert (tmp_path / "loss.svg").exists() and (tmp_path / "log.csv").exists()
