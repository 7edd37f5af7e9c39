"""Evaluation through the engine: repeatable, independent of batch size, honest about bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsejax import EngineConfig, SamplingParams
from sparsejax.cli import main
from sparsejax.cli.eval import QUICK_ENGINE
from sparsejax.engine.table import StepTable
from sparsejax.errors import ConfigError
from sparsejax.evaluation.policies import DENSE, Policy, by_store
from sparsejax.evaluation.report import as_json
from sparsejax.evaluation.results import Evaluation
from sparsejax.evaluation.runner import evaluate, make_cells, measure_kv, run_cell
from sparsejax.evaluation.suite import QUICK, Request, Suite
from sparsejax.evaluation.tasks import Turn
from sparsejax.models.loader import load_model
from sparsejax.models.tokenizer import load_tokenizer
from tests.engine.models import random_prompts, tiny_engine

TOGETHER = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, num_decode_steps=1)
FILTERED = (("filter_layers", (0, 1)), ("interval", 4))
SUITE = Suite(cases=("niah_multikey", "kv_dense_turns", "qa"), lengths=(96, 160), samples=5, seed=7)


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
    suite = dataclasses.replace(SUITE, seed=100, cases=("kv_dense_turns",), lengths=(96,))
    ((cell,), _) = make_cells(suite, shipped[1])
    ours = {"".join(one.turn.reply for one in turns).strip() for turns in cell.documents}
    assert len(ours) == 5 and not ours & set(alone.dense.find("kv_dense_turns", 96).expected)


def test_a_document_is_right_if_all_its_turns_are(shipped: tuple[Any, Any]) -> None:
    class Replies:
        """An engine that answers the first two questions of each document rightly, the others wrongly."""

        def stats(self) -> dict[str, float]:
            return {"compile_seconds": 0.0, "computed_tokens": 0}

        def generate(self, prompts: list[dict], params: Any, use_tqdm: bool) -> list[Any]:
            texts = [one.turn.reply if index % 4 < 2 else "" for index, one in enumerate(cell.requests)]
            return [
                SimpleNamespace(prompt_token_ids=[], outputs=[SimpleNamespace(text=text, token_ids=[])])
                for _, text in zip(prompts, texts, strict=True)
            ]

    suite = dataclasses.replace(SUITE, cases=("kv_dense_turns",), lengths=(96,), samples=2)
    ((cell,), _) = make_cells(suite, shipped[1])
    found = run_cell(Replies(), DENSE, cell)
    assert (found.right, found.recall) == ((False, False), 0.5)


def test_policies_are_served_as_requests_of_one_engine(shipped: tuple[Any, Any]) -> None:
    """Reading all pages through a select is dense; reading few of them is not."""
    quest = (Policy("quest", 1024), Policy("window", 32))
    suite = Suite(cases=("kv_dense",), lengths=(512,), samples=4)
    all_pages, few = evaluate(*shipped, suite, (DENSE, *quest), TOGETHER).results[1:]
    assert all_pages.cells[0].accuracy == 1.0 and few.cells[0].accuracy < 1.0
    assert all_pages.kv[0].read == all_pages.kv[0].held == few.kv[0].held > 2 * few.kv[0].read


def test_the_engine_counts_the_bytes(shipped: tuple[Any, Any], alone: Evaluation) -> None:
    shape, page = shipped[0].config, EngineConfig().page_size
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    for kv in alone.dense.kv:
        assert 0 <= kv.held - kv.length * per_token <= 2 * page * per_token
        assert kv.peak >= kv.held


@pytest.mark.slow
def test_evicted_tokens_and_coded_pages_hold_fewer_bytes() -> None:
    (prompt,) = random_prompts(3, (150,))
    request, cost = Request(tuple(prompt), len(prompt), Turn("", ("a",), frozenset(), False, "")), {}
    policies = DENSE, Policy("snapkv", 48), Policy("int8"), Policy("quest", 64), Policy("quest", 64, FILTERED)
    for group in by_store(policies).values():
        with tiny_engine(sparsity=[policy.sparsity for policy in group], warmup="none") as engine:
            for policy in group:
                engine.generate(prompt, SamplingParams(max_tokens=3))  # what it leaves behind is not counted
                cost[policy] = measure_kv(engine, policy, request)
    dense, evicted, coded, quest, filtered = (cost[policy] for policy in policies)
    assert dense.read == dense.held and dense.seconds > 0
    assert evicted.read == evicted.held < 0.6 * dense.held and evicted.peak > 2 * evicted.held
    assert coded.read == coded.held < 0.7 * dense.held
    # Least and largest of each channel of K: one part in 16 of K and V of full or open pages, 10 in ten steps and 11 in
    # six. An interval of 4 reads them in one of four steps.
    page_bytes = 2 * 2 * 2 * 16 * 16 * 4
    assert quest.bounds == (10 * 10 + 6 * 11) / 16 * page_bytes / 16 == 4 * filtered.bounds
    assert dense.bounds == evicted.bounds == 0
    assert quest.step == quest.read + quest.bounds


def test_dense_comes_first_and_documents_must_fit(shipped: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="first policy must be dense"):
        evaluate(*shipped, SUITE, [Policy("other"), DENSE])
    limit = shipped[0].config.max_position_embeddings
    with pytest.raises(ConfigError, match="shorter lengths"):
        evaluate(*shipped, Suite(cases=("kv",), lengths=(limit,), samples=1))


def test_the_command_prints_and_stores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results.json"
    argv = ["eval", "--cases", "niah_single", "fwe", "--lengths", "96", "--samples", "2", "--json", str(out)]
    argv += ["--presets", "quest", "snapkv+int8", "--budgets", "0.5"]
    engine = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--num-decode-steps", "1"]
    assert main(argv + engine) == 0
    printed = capsys.readouterr()
    assert "| niah_single |" in printed.out and "tokens/s" in printed.out
    assert "fwe at 96 was left out" in printed.out
    assert "niah_single at 96 tokens" in printed.err
    stored = json.loads(out.read_text())
    assert [one["policy"] for one in stored["policies"]] == ["dense", "quest 0.5", "snapkv+int8 0.5"]
    assert stored["policies"][0]["cells"][0]["samples"] == 2
    assert main(["eval", "--cases", "nothing"]) == 2
    assert "known are" in capsys.readouterr().err


def test_a_quick_run_compiles_two_step_programs_per_engine() -> None:
    table = StepTable.build(*QUICK_ENGINE.values())
    assert len(table.chunk_buckets) == 1 and table.decode(QUICK.samples // 2, 1, True) in list(table.keys())[:2]
