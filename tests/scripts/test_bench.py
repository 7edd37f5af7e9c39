"""The benchmark's parts: a fixed workload, checkpoints, contenders as processes, and the tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from bench_report import rewrite
from benchmarks import process, random_model, report, workload
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
ECHO = """
import sys
sys.path.insert(0, {folder!r})
from contender import main

def load(settings):
    print("noise on the standard output")
    if settings["mode"] == "broken":
        raise ValueError("no such model")
    return (lambda requests: [prompt[:new] for prompt, new in requests]), {{"echo": "1"}}

main(load)
"""


def test_workload_is_fixed():
    described = workload.FULL.describe()
    assert (described["prompt_tokens"], described["new_tokens"]) == (7421, 1519)
    first, again, other = (workload.FULL.make(r) for r in (0, 0, 1))
    assert first == again != other
    assert [len(p) for p, _ in first] == [len(p) for p, _ in other]
    assert all(64 <= len(p) <= 1024 and 64 <= new <= 128 and min(p) >= 3 for p, new in first)


def test_random_model_has_the_same_numbers_in_both_dtypes(tmp_path):
    paths = [random_model.write(random_model.TINY, dtype, tmp_path) for dtype in ("float32", "bfloat16")]
    full, half = (load_file(path / "model.safetensors") for path in paths)
    assert full.keys() == half.keys()
    for name, value in full.items():
        np.testing.assert_array_equal(value.astype(ml_dtypes.bfloat16), half[name])
    config = json.loads((paths[1] / "config.json").read_text())
    assert (config["dtype"], config["num_key_value_heads"]) == ("bfloat16", 2)
    assert random_model.write(random_model.TINY, "float32", tmp_path) == paths[0]


def contender(tmp_path: Path, mode: str) -> process.Contender:
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(folder=str(ROOT / "scripts/benchmarks")))
    return process.Contender("echo", sys.executable, str(script), {"mode": mode, "threads": 1})


def test_contender_answers_and_ends(tmp_path):
    with contender(tmp_path, "good") as echo:
        assert echo.loaded["versions"] == {"echo": "1"}
        answer = echo.run([([5, 6, 7], 2), ([8], 1)])
        assert answer["tokens"] == [[5, 6], [8]]
        assert answer["peak_mib"] > 1 and answer["seconds"] >= 0
    assert echo.process.returncode == 0


def test_contender_error_is_reported(tmp_path):
    with pytest.raises(process.ContenderFailed, match="no such model"):
        contender(tmp_path, "broken")


def results() -> dict:
    def runs(name: str, seconds: list[float]) -> list[dict]:
        return [
            {
                "contender": name,
                "repetition": i,
                "seconds": s,
                "cpu_seconds": 2 * s,
                "peak_mib": 100.0,
                "foreign_cpu": 0.01,
                "load_average": 1.0,
                "new_tokens": 60,
                "same_tokens": 16,
            }
            for i, s in enumerate(seconds)
        ]

    entry = {
        "versions": {"jax": "1"},
        "runs": runs("transformers sorted", [4.0, 6.0, 5.0])
        + runs("transformers static", [9.0, 9.0, 9.0])
        + runs("sparsejax", [2.0, 2.0, 3.0]),
    }
    return {"machine": {"cpu": "a processor"}, "threads": 2, "workload": workload.FULL.describe(),
            "dtypes": {"bfloat16": entry}}  # fmt: skip


def test_table_compares_with_the_best_mode():
    text = report.serve_table(results(), "bfloat16")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["sparsejax", "transformers, sorted batches of 4", "transformers, one padded batch"]
    assert "2.50 x the throughput of the best mode (transformers, sorted batches of 4)" in text
    assert "within single repetitions 1.67 to 3.00 x" in text


def test_readme_table_is_made_from_stored_results(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/serve.json").write_text(json.dumps(results()))
    text = "before\n<!-- bench:cpu/serve.json bfloat16 -->\nold\n<!-- /bench -->\nafter\n"
    new = rewrite(text, tmp_path)
    assert "old" not in new and "2.50 x" in new and new.startswith("before") and new.endswith("after\n")
    assert rewrite(new, tmp_path) == new


def test_readme_tables_are_current():
    subprocess.run([sys.executable, "scripts/bench_report.py", "--check"], cwd=ROOT, check=True)
