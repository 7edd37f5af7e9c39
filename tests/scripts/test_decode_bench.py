"""The decode benchmark: what it measures on a tiny model, its table, and the page of combinations."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_every_policy_reads_what_its_budget_allows(scripts, tmp_path):
    from benchmarks import decode, random_model

    sizes = {"keep": 128, "page_size": 32, "dtype": "float32", "steps": 2, "reps": 2}
    args = argparse.Namespace(policies=["dense", "quest", "deltakv"], cache=tmp_path, **sizes)
    runs = decode.measure(random_model.write(random_model.TINY, "float32", tmp_path), 512, args)
    rotated = ["dense", "quest", "deltakv", "quest", "deltakv", "dense"]
    assert [run["policy"] for run in runs] == rotated
    read = {"dense": 1, "quest": 0.25, "deltakv": 0.625}  # of two layers the first reads all, to select
    assert [run["read"] for run in runs] == [read[name] for name in rotated]
    assert all(run["seconds"] > 0 and run["cpu_seconds"] > 0 for run in runs)


def test_the_table_compares_within_repetitions(scripts):
    from benchmarks.decode_report import decode_table, gains_table

    def run(policy, repetition, seconds):
        figures = {"seconds": seconds, "cpu_seconds": 2 * seconds, "read": 0.5, "foreign_cpu": 0.25}
        return {"policy": policy, "context": 1024, "repetition": repetition, **figures}

    runs = [run("dense", 0, 0.4), run("dense", 1, 0.9), run("quest", 0, 0.1), run("quest", 1, 0.3)]
    entry = {"versions": {"jax": "1"}, "policies": {"dense": {}, "quest": {"preset": "quest"}}, "runs": runs}
    load = {"rows": 4, "keep": 512, "page_size": 32, "steps": 8}
    results = {"dtypes": {"bfloat16": entry}, "workload": load, "machine": {"cpu": "some"}, "threads": 2}
    results["model"] = {"layers": 12}
    table = decode_table(results, "bfloat16")
    assert "| 1024 | dense | 650.0 (400.0 to 900.0), 1300.0 |  | 50% |" in table
    assert "| 1024 | quest | 200.0 (100.0 to 300.0), 400.0 | 3.50 x, 3.50 x | 50% |" in table
    assert "others used 25% of the processors" in table
    assert gains_table(results, "bfloat16").endswith("| quest | 3.50 x |\n")


def test_the_page_of_methods_is_what_the_checks_say():
    check = [sys.executable, str(ROOT / "scripts/methods_table.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
