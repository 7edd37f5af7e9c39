"""Evaluation through the engine: repeatable, independent of batch size, honest about bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sparsejax import EngineConfig
from sparsejax.cli import main
from sparsejax.errors import ConfigError
from sparsejax.evaluation.policies import DENSE, Policy
from sparsejax.evaluation.report import as_json
from sparsejax.evaluation.results import Evaluation
from sparsejax.evaluation.runner import evaluate, make_cells
from sparsejax.evaluation.suite import Suite
from sparsejax.models.loader import load_model
from sparsejax.models.tokenizer import load_tokenizer

TOGETHER = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, num_decode_steps=1)
SUITE = Suite(cases=("niah_multikey", "kv_dense", "qa"), lengths=(96, 160), samples=5, seed=7)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    model = load_model(None)
    return model, load_tokenizer(model.path)


@pytest.fixture(scope="module")
def alone(shipped: tuple[Any, Any]) -> Evaluation:
    return evaluate(*shipped, SUITE, config=EngineConfig(max_num_seqs=1, num_decode_steps=1))


def without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_timing(one) for name, one in value.items() if name != "timing"}
    return [without_timing(one) for one in value] if isinstance(value, list) else value


def test_same_seeds_same_numbers_on_any_batch_size(shipped: tuple[Any, Any], alone: Evaluation) -> None:
    together = evaluate(*shipped, SUITE, config=TOGETHER)
    assert [cell.replies for cell in together.dense.cells] == [cell.replies for cell in alone.dense.cells]
    first, second = (without_timing(as_json(one)["policies"][0]["cells"]) for one in (together, alone))
    assert json.dumps(first) == json.dumps(second)


def test_other_seeds_are_other_documents(shipped: tuple[Any, Any], alone: Evaluation) -> None:
    suite = dataclasses.replace(SUITE, seed=100, cases=("kv_dense",), lengths=(96,))
    ((cell,), _) = make_cells(suite, shipped[1])
    assert not {turn.reply.strip() for turn in cell.turns} & set(alone.dense.find("kv_dense", 96).expected)


def test_the_engine_counts_the_bytes(shipped: tuple[Any, Any], alone: Evaluation) -> None:
    shape, page = shipped[0].config, EngineConfig().page_size
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    for kv in alone.dense.kv:
        assert 0 <= kv.held - kv.length * per_token <= 2 * page * per_token
        assert kv.peak >= kv.held


def test_dense_comes_first_and_documents_must_fit(shipped: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="first policy must be dense"):
        evaluate(*shipped, SUITE, [Policy("other"), DENSE])
    limit = shipped[0].config.max_position_embeddings
    with pytest.raises(ConfigError, match="shorter lengths"):
        evaluate(*shipped, Suite(cases=("kv",), lengths=(limit,), samples=1))


def test_the_command_prints_and_stores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results.json"
    argv = ["eval", "--cases", "niah_single", "fwe", "--lengths", "96", "--samples", "2", "--json", str(out)]
    argv += ["--presets", "quest", "--budgets", "0.5"]
    engine = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--num-decode-steps", "1"]
    assert main(argv + engine) == 0
    printed = capsys.readouterr()
    assert "| niah_single |" in printed.out and "tokens/s" in printed.out
    assert "fwe at 96 was left out" in printed.out
    assert "niah_single at 96 tokens" in printed.err
    stored = json.loads(out.read_text())
    assert [one["policy"] for one in stored["policies"]] == ["dense", "quest 0.5"]
    assert stored["policies"][0]["cells"][0]["samples"] == 2
    assert main(["eval", "--cases", "nothing"]) == 2
    assert "known are" in capsys.readouterr().err
