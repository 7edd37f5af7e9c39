"""The GPU suite: its small form as a whole, and how it outlives cases that fail, crash or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from suite import compare, exact, paged, records, report, supervisor

from tests.kernels import oracle

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys, time
sys.path[:0] = [{scripts!r}]
from suite import records

def fail():
    raise ValueError("on purpose")

def crash():
    sys.exit(9)

def hang():
    time.sleep(60)

cases = [("a", lambda: {{"x": 1}}), ("b", fail), ("c", crash), ("d", hang), ("e", lambda: {{"x": 2}})]
records.run_cases("s", cases, skip=set(sys.argv[2:]), deadline=time.time() + 60, alive=lambda: True)
"""


def test_the_small_suite_runs_with_jax_flax_and_numpy_alone(tmp_path):
    # Read by every interpreter that the suite starts.
    absent = (
        "jaxtyping",
        "beartype",
        "transformers",
        "safetensors",
        "orbax",
        "torch",
        "hypothesis",
        "pytest",
    )
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {absent}:\n    sys.modules[name] = None\n")
    output = tmp_path / "result.json"
    command = [sys.executable, "scripts/gpu_suite.py", "--tiny", "--output", str(output), "--seed", "7"]
    command += ["--seconds", "3600", "--case-seconds", "600"]  # a busy machine is no failure
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["seed"] == 7
    status = {record["case"]: record["status"] for record in result["cases"]}
    assert {stage: "ok" for stage in status if stage.startswith(("numerics", "decode_step"))}.items() <= status.items()
    assert status["attention/decode tiny: ours"] == "ok" == status["attention/decode tiny: XLA gather"]
    assert status["attention/page_scores 2 x 128: ours"] == "ok" == status["attention/window_scores 2 x 128: XLA"]
    assert all(status[f"attention/latents 2 x 128, lists of 64: {who}"] == "ok" for who in ("ours", "XLA"))
    assert status["attention/decode tiny: cuDNN, contiguous"] == "unavailable"
    assert "| attention/decode tiny: ours |" in done.stdout


def test_failing_crashing_and_hanging_cases_are_recorded_and_outlived(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(scripts=str(ROOT / "scripts")))
    shown = []
    found = supervisor.supervise(
        [sys.executable, str(script)], deadline=time.time() + 60, case_seconds=2.0, show=shown.append
    )
    outcome = {r["case"]: (r["status"], r.get("reason", "")) for r in found}
    assert outcome["s/a"] == outcome["s/e"] == ("ok", "")
    assert outcome["s/b"] == ("error", "ValueError: on purpose")
    assert outcome["s/c"] == ("error", "crashed (9)")
    assert outcome["s/d"] == ("error", "hung")
    assert len(shown) == 5


def test_no_case_starts_after_the_deadline(capsys):
    records.run_cases("s", [("a", dict)], skip=set(), deadline=time.time() - 1, alive=lambda: True)
    assert json.loads(capsys.readouterr().out.removeprefix(records.MARK))["reason"] == "out of time"


def test_a_device_that_no_longer_computes_ends_the_worker():
    def fail():
        raise RuntimeError("illegal address")

    with pytest.raises(SystemExit) as caught:
        records.run_cases("s", [("a", fail)], skip=set(), deadline=time.time() + 9, alive=lambda: False)
    assert caught.value.code == records.BROKEN


@pytest.mark.parametrize("chunks", (None, (5, 0, 9)))
def test_the_float64_reference_agrees_with_the_token_by_token_one(chunks):
    case = paged.draw(
        np.random.default_rng(3), (9, 0, 40), chunks, heads=4, head_dim=16, page=16, dtype="f32",
        head_lists=True, gaps=True, sinks=True, window=20, soft_cap=3.0,
    )  # fmt: skip
    out, lse = exact.attend(case)
    object.__setattr__(case, "query_starts", case.starts)
    # The other reference takes the scale from the case too.
    expected, expected_lse = oracle.decode(case) if chunks is None else oracle.prefill(case)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-9)


def test_wrong_numbers_fail_a_case():
    with pytest.raises(AssertionError, match="relative error"):
        compare.compared(np.full(3, 1.02), np.ones(3), 1e-2)
    with pytest.raises(AssertionError, match="1 of 3 values are not finite"):
        compare.compared(np.array([1, np.nan, 1]), np.ones(3), 1e-2)


def test_the_table_gives_shares_of_the_copy_bandwidth():
    cases = [
        {"case": "machine", "device": "NVIDIA H200", "status": "ok"},
        {"case": "attention/copy bandwidth", "status": "ok", "copy_bytes_per_s": 4e12},
        {"case": "attention/x", "status": "ok", "seconds": 1e-3, "bytes": 2e9, "bytes_per_s": 2e12},
        {"case": "attention/y", "status": "error", "reason": "r"},
    ]
    assert "| attention/x | 1000.0 | 2.000 | 2000 | 50.0% |  |" in report.table(cases)
    assert report.default_path(cases, Path("r")).name == "gpu_suite_nvidia_h200.json"
