"""The benchmark's parts: a fixed workload, checkpoints, contenders as processes, and the tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import pytest
from bench_report import rewrite
from benchmarks import process, random_model, report, rounds, store, workload
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
    return (lambda requests: [prompt[:new] for prompt, new in requests]), {{"versions": {{"echo": "1"}}}}

calls = 0

def counters():
    global calls
    calls += 1
    return {{"calls": calls}}

main(load, counters)
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
        assert answer["peak_mib"] > 1 and answer["seconds"] >= 0 and answer["calls"] == 1
    assert echo.process.returncode == 0


def test_contender_error_is_reported(tmp_path):
    with pytest.raises(process.ContenderFailed, match="no such model"):
        contender(tmp_path, "broken")


def test_a_repetition_takes_turns_and_compares_tokens(tmp_path):
    with contender(tmp_path, "good") as one, contender(tmp_path, "good") as two:
        one.name, two.name = "one", "two"
        for process_ in (one, two):
            process_.run = without_calls(process_.run)
        runs = rounds.one_repetition([one, two], workload.TINY, 1, "test")
    assert [run["contender"] for run in runs] == ["two", "one"]
    assert all(run["same_tokens"] == 4 and run["new_tokens"] == 21 for run in runs)


def without_calls(run: Callable) -> Callable:
    def wrapped(*args, **kwargs):
        answer = run(*args, **kwargs)
        del answer["calls"]
        return answer

    return wrapped


def test_clock_keeps_to_its_limit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rounds.time, "monotonic", lambda: now[0])
    clock = rounds.Clock(10)
    clock.share(2)  # five minutes for this part
    done = 0
    while clock.has_time(done):
        with clock.repetition():
            now[0] += 120
        done += 1
    assert (done, clock.outlook(3)) == (2, "about 6.0 minutes to go for this dtype")
    now[0] += 1000
    assert clock.has_time(0)


def test_results_of_another_dtype_stay(tmp_path):
    path, both = tmp_path / "serve.json", results()
    store.save(path, both | {"dtypes": {"float32": both["dtypes"]["bfloat16"]}})
    store.save(path, both)
    assert set(json.loads(path.read_text())["dtypes"]) == {"float32", "bfloat16"}
    store.save(path, both | {"threads": 7})
    assert set(json.loads(path.read_text())["dtypes"]) == {"bfloat16"}


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
    return {
        "machine": {"cpu": "a processor"},
        "threads": 2,
        "model": {"name": "m124"},
        "workload": workload.FULL.describe(),
        "dtypes": {"bfloat16": entry},
    }


def test_table_compares_with_the_best_mode():
    text = report.serve_table(results(), "bfloat16")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["sparsejax", "transformers, sorted batches of 4", "transformers, one padded batch"]
    assert "2.50 x the throughput of the best mode (transformers, sorted batches of 4)" in text
    assert "within single repetitions 1.67 to 3.00 x" in text


def test_readme_table_is_made_from_stored_results(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- chart:cpu/serve.json -->\n<!-- /bench -->\n"
        "<!-- bench:cpu/serve.json bfloat16 -->\nold\n<!-- /bench -->\nafter\n"
    )
    assert rewrite(readme, tmp_path)[readme].count("Not measured yet") == 2
    stored = tmp_path / "docs/results/cpu/serve.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps(results()))
    made = rewrite(readme, tmp_path)
    new, picture = made[readme], made[stored.with_suffix(".svg")]
    assert "old" not in new and "2.50 x" in new and new.startswith("before") and new.endswith("after\n")
    assert "](docs/results/cpu/serve.svg)" in new
    ElementTree.fromstring(picture)
    assert picture.count("<rect") == 4 and picture.count(">30<") == 1
    readme.write_text(new)
    assert rewrite(readme, tmp_path)[readme] == new


def test_tables_of_evaluations(tmp_path):
    def cell(length: int, right: int, samples: int) -> dict:
        outcomes = "1" * right + "0" * (samples - right)
        return dict(case="kv", length=length, right=right, samples=samples, accuracy=right / samples,
                    interval=[0.5, 1.0], outcomes=outcomes, difference=0.0, difference_interval=[0.0, 0.0])  # fmt: skip

    kv = [{"held_bytes": 4e6, "read_bytes": 2e6}]
    dense = {"policy": "dense", "cells": [cell(512, 8, 8), {**cell(512, 1, 8), "case": "qa"}], "kv": kv}
    few = {"policy": "quest 0.25", "cells": [cell(512, 3, 8)], "kv": kv}
    folder = tmp_path / "docs/results"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps({"policies": [dense, few], "not_learned": [["qa", 512]]}))
    more = {"policies": [{"cells": [cell(512, 30, 40), cell(1024, 40, 40)]}]}
    (folder / "b.json").write_text(json.dumps(more))
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {kind} -->\n<!-- /bench -->\n" for kind in
                            ("accuracy:a.json,b.json", "policies:a.json", "policies:c.json")))  # fmt: skip
    text = rewrite(page, tmp_path)[page]
    assert "| case | 512 tokens | 1024 tokens |" in text
    assert "| `kv` | 75.0 [50-100] of 40, 0 to 100 | 100.0 [50-100] of 40 |" in text
    assert "| `qa` | 12.5 [50-100] of 8, 0 to 50 | - |" in text
    assert "| quest 0.25 | 3 of 8 | `kv` | +0 [+0 to +0] | 4.00 | 2.00 |" in text and "`qa` 512" not in text
    assert text.count("Not measured yet") == 1


def test_readme_tables_are_current():
    subprocess.run([sys.executable, "scripts/bench_report.py", "--check"], cwd=ROOT, check=True)
