"""Runs a suite through one engine per way to store pages: cell by cell, one policy after the other, dense first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from sparsejax import Engine, EngineConfig, SamplingParams
from sparsejax.cache.codecs.compressor import fingerprint
from sparsejax.engine.step import COMPRESSOR
from sparsejax.errors import ConfigError
from sparsejax.evaluation.bounds import bounds_bytes
from sparsejax.evaluation.policies import DENSE, Policy, by_store
from sparsejax.evaluation.results import CellResult, Evaluation, KvBytes, PolicyResult
from sparsejax.evaluation.suite import Cell, Request, Suite, make_cell
from sparsejax.evaluation.summary import is_learned
from sparsejax.models.loader import LoadedModel

DECODED = 16
"""Decode steps whose bytes are averaged."""
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
    results: dict[Policy, PolicyResult] = {}
    for group in by_store(policies).values():
        with Engine.from_loaded(model, tokenizer, config=config, sparsity=[one.sparsity for one in group]) as engine:
            served = run_group(engine, group, cells, every_cell, report)
        results |= served
        if DENSE in served and not every_cell:
            learned = {(one.case, one.length) for one in served[DENSE].cells if is_learned(one)}
            cells = [cell for cell in cells if (cell.case, cell.length) in learned]
    name, seconds = model.path.name if model.path else "in memory", time.perf_counter() - started
    return Evaluation(name, suite, tuple(results[policy] for policy in policies), tuple(skipped), seconds)


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


def run_group(
    engine: Engine, policies: Sequence[Policy], cells: Sequence[Cell], every_cell: bool, report: Report
) -> dict[Policy, PolicyResult]:
    """Every cell under each policy of an engine, and the KV bytes of a document of each length.

    The policies of a cell follow each other, so that they find its documents in the engine's prefix cache. Those after
    dense serve what dense has learned.
    """
    done: dict[Policy, list[tuple[Cell, CellResult]]] = {policy: [] for policy in policies}
    for cell in cells:
        for policy in policies:
            found = run_cell(engine, policy, cell)
            done[policy].append((cell, found))
            report(policy, found)
            if policy == DENSE and not every_cell and not is_learned(found):
                break
    weights, results = engine.core.runner.params.get(COMPRESSOR), {}
    compressor = None if weights is None else fingerprint(weights)
    for policy, served in done.items():
        first = {cell.length: cell.requests[0] for cell, _ in reversed(served)}
        kv = tuple(measure_kv(engine, policy, first[length]) for length in sorted(first))
        results[policy] = PolicyResult(policy, tuple(found for _, found in served), kv, compressor)
    return results


def run_cell(engine: Engine, policy: Policy, cell: Cell) -> CellResult:
    """Greedy replies to all requests of a cell; a document is right if every reply about it is."""
    params = SamplingParams(temperature=0.0, max_tokens=cell.max_tokens, sparsity=policy.sparsity)
    before, started = engine.stats(), time.perf_counter()
    outputs = engine.generate([request.prompt for request in cell.requests], params, use_tqdm=False)
    seconds, after = time.perf_counter() - started, engine.stats()
    tokens, compiling = (after[name] - before[name] for name in ("computed_tokens", "compile_seconds"))
    replies = iter([output.outputs[0].text for output in outputs])
    pairs = [[(request.turn, next(replies)) for request in document] for document in cell.documents]
    return CellResult(
        cell.case,
        cell.length,
        tuple(all(turn.score(reply) for turn, reply in turns) for turns in pairs),
        sum(turn.recall(reply) for turns in pairs for turn, reply in turns) / len(outputs),
        tokens,
        seconds - compiling,
        tuple("".join(reply for _, reply in turns) for turns in pairs),
        tuple("".join(turn.reply for turn, _ in turns).strip() for turns in pairs),
    )


def measure_kv(engine: Engine, policy: Policy, request: Request) -> KvBytes:
    """Serves one request alone and reads the engine's own counts of KV bytes; compilation is not timed."""
    params = SamplingParams(
        temperature=0.0, max_tokens=DECODED + 1, ignore_eos=True, detokenize=False, sparsity=policy.sparsity
    )
    engine.step()  # takes in what earlier requests left on the device, so that it is not counted here
    before, peak, started = engine.stats(), 0, None
    engine.add_request("kv-bytes", request.prompt, params)
    while engine.has_unfinished():
        outputs, now = engine.step(), engine.stats()
        peak = max(peak, now["kv_live_bytes"])
        if started is None and any(output.outputs[0].token_ids for output in outputs):
            started, compiled = time.perf_counter(), now["compile_seconds"]
    seconds = time.perf_counter() - started - (now["compile_seconds"] - compiled)
    counted = max(now["decode_queries"] - before["decode_queries"], 1)
    names = ("decode_held_bytes", "decode_read_bytes", "decode_pages_held")
    held, read, pages = ((now[name] - before[name]) / counted for name in names)
    length = len(request.token_ids)
    bounds = bounds_bytes(engine, engine.core.policy_of(params, length), length, pages)
    return KvBytes(length, held, peak, read, seconds / DECODED, bounds)


def _longest(cells: Sequence[Cell], model: LoadedModel) -> int:
    """Tokens of the longest document with its reply, if the model was made for as many."""
    longest = max(len(request.token_ids) + cell.max_tokens for cell in cells for request in cell.requests)
    limit = model.config.max_position_embeddings
    if longest > limit:
        raise ConfigError(
            f"documents of {max(cell.length for cell in cells)} tokens with their replies need {longest} positions, "
            f"but the model was made for {limit}: ask for shorter lengths"
        )
    return longest
