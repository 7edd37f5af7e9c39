"""Runs a suite through the engine, one policy after the other, dense first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from sparsejax import Engine, EngineConfig, SamplingParams
from sparsejax.errors import ConfigError
from sparsejax.evaluation.policies import DENSE, Policy
from sparsejax.evaluation.results import CellResult, Evaluation, KvBytes, PolicyResult
from sparsejax.evaluation.suite import Cell, Suite, make_cell
from sparsejax.evaluation.summary import is_learned
from sparsejax.models.loader import LoadedModel

Report = Callable[[Policy, CellResult], None]


def evaluate(
    model: LoadedModel,
    tokenizer: Any,
    suite: Suite,
    policies: Sequence[Policy] = (DENSE,),
    config: EngineConfig | None = None,
    *,
    every_cell: bool = False,
    report: Report = lambda policy, cell: None,
) -> Evaluation:
    """Serves every document of `suite` greedily under each policy.

    Args:
        model, tokenizer: what to evaluate; tasks are made with this tokenizer.
        policies: the first must be dense; the others serve only cells that dense has learned.
        config: engine settings; the policy replaces its sparsity, and the suite its length.
        every_cell: let every policy serve every cell.
        report: called after each cell.

    Raises:
        ConfigError: the suite's documents and replies exceed what the model was made for, or no cell fits.
    """
    if not policies or policies[0] != DENSE:
        raise ConfigError("the first policy must be dense: everything else is compared with it")
    started = time.perf_counter()
    cells, skipped = make_cells(suite, tokenizer)
    config = dataclasses.replace(config or EngineConfig(), max_model_len=_longest(cells, model))
    results: list[PolicyResult] = []
    for policy in policies:
        chosen = cells
        if results and not every_cell:
            learned = {(one.case, one.length) for one in results[0].cells if is_learned(one)}
            chosen = [cell for cell in cells if (cell.case, cell.length) in learned]
        with Engine.from_loaded(model, tokenizer, config=config, sparsity=policy.sparsity) as engine:
            results.append(run_policy(engine, policy, chosen, report))
    seconds = time.perf_counter() - started
    return Evaluation(model.path.name if model.path else "in memory", suite, tuple(results), tuple(skipped), seconds)


def make_cells(suite: Suite, tokenizer: Any) -> tuple[list[Cell], list[tuple[str, int, str]]]:
    """The cells of a suite, and those that cannot be made with this tokenizer, with the reason."""
    cells, skipped = [], []
    for case in suite.cases:
        for length in suite.lengths:
            try:
                cells.append(make_cell(case, length, suite.samples, suite.seed, tokenizer))
            except ConfigError as error:
                skipped.append((case, length, str(error)))
    if not cells:
        raise ConfigError(f"no case fits the lengths asked for: {skipped[0][2]}")
    return cells, skipped


def run_policy(engine: Engine, policy: Policy, cells: Sequence[Cell], report: Report) -> PolicyResult:
    """Every cell under one policy, and the KV bytes of a document of each length."""
    done = []
    for cell in cells:
        done.append(run_cell(engine, cell))
        report(policy, done[-1])
    first = {cell.length: cell for cell in reversed(cells)}
    kv = tuple(measure_kv(engine, first[length].prompts[0]) for length in sorted(first))
    return PolicyResult(policy, tuple(done), kv)


def run_cell(engine: Engine, cell: Cell) -> CellResult:
    """Greedy replies to all documents of a cell, scored."""
    params = SamplingParams(temperature=0.0, max_tokens=cell.max_tokens)
    compiled, started = engine.stats()["compile_seconds"], time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": list(ids)} for ids in cell.prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - started - (engine.stats()["compile_seconds"] - compiled)
    replies = tuple(output.outputs[0].text for output in outputs)
    pairs = list(zip(cell.turns, replies, strict=True))
    tokens = sum(map(len, cell.prompts)) + sum(len(output.outputs[0].token_ids) for output in outputs)
    return CellResult(
        cell.case,
        cell.length,
        tuple(turn.score(reply) for turn, reply in pairs),
        sum(turn.recall(reply) for turn, reply in pairs) / len(pairs),
        tokens,
        seconds,
        replies,
        tuple(turn.reply.strip() for turn in cell.turns),
    )


def measure_kv(engine: Engine, prompt: Sequence[int]) -> KvBytes:
    """Serves one prompt alone up to its first token and reads the engine's own count of live KV bytes."""
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    engine.add_request("kv-bytes", {"prompt_token_ids": list(prompt)}, params)
    held = peak = 0
    try:
        answered = False
        while not answered:
            answered = any(output.outputs[0].token_ids for output in engine.step())
            held = engine.stats()["kv_live_bytes"] or held
            peak = max(peak, held)
    finally:
        engine.abort("kv-bytes")
    while engine.has_unfinished():
        engine.step()
    return KvBytes(len(prompt), held, peak)


def _longest(cells: Sequence[Cell], model: LoadedModel) -> int:
    """Tokens of the longest document with its reply, if the model was made for as many."""
    longest = max(cell.length + cell.max_tokens for cell in cells)
    limit = model.config.max_position_embeddings
    if longest > limit:
        raise ConfigError(
            f"documents of {max(cell.length for cell in cells)} tokens with their replies need {longest} positions, "
            f"but the model was made for {limit}: ask for shorter lengths"
        )
    return longest
