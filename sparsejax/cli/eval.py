"""Measure quality against KV bytes: long-context tasks served under each sparsity preset, compared with dense.

sparsejax eval --quick
sparsejax eval --model DIR --lengths 4096 8192 --samples 100 --json results.json --plot results.png
sparsejax eval --model DIR --proxies --text FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from sparsejax.cli import options, proxies
from sparsejax.errors import ModelError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--quick", action="store_true", help="four cases, one budget, 8 documents each")
    group.add_argument("--cases", nargs="+", metavar="CASE", help="'core', 'all' or names; a wrong name lists them")
    group.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of a document with its question")
    group.add_argument("--samples", type=int, metavar="N", help="documents per case and length")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first document (default: 0)")
    group.add_argument(
        "--presets", nargs="+", type=options.parse_value, metavar="NAME|JSON",
        help="sparsity presets, some joined by + (snapkv+int4, keydiff:0.5+quest:0.25+int8: at most one of what stays, "
        "what is read and how it is stored, each with a budget where wanted), or mappings such as '{\"preset\": "
        "\"turbo\", \"interval\": 1}' (default: all presets that need no training)",
    )  # fmt: skip
    group.add_argument(
        "--budgets", nargs="+", metavar="B", help="tokens (2048) or share of prompt (0.25), for what names none"
    )
    group.add_argument("--every-cell", action="store_true", help="all presets serve what dense has not learned, too")
    group.add_argument("--json", metavar="FILE", help="write everything that was measured")
    group.add_argument("--plot", metavar="FILE", help="draw accuracy against KV bytes (needs matplotlib)")
    group = parser.add_argument_group("proxies")
    group.add_argument("--proxies", action="store_true", help="no tasks: attention and logits on a text of your own")
    group.add_argument("--text", metavar="FILE", help="the text; it is cut to each of --lengths (default: 1024)")
    group.add_argument("--steps", type=int, default=64, metavar="N", help="last tokens that are decoded (default: 64)")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    from sparsejax.evaluation import plot
    from sparsejax.evaluation.policies import ANY_MODEL, make_policies
    from sparsejax.sparsity.names import parse_budget

    budgets = args.budgets or (QUICK_BUDGETS if args.quick else BUDGETS)
    policies = make_policies(args.presets or ANY_MODEL, map(parse_budget, budgets))
    if args.proxies:
        return proxies.run(args, policies)
    suite = make_suite(args)
    config = options.make_config(args, **(QUICK_ENGINE if args.quick else {}))
    if args.plot:
        plot.load_pyplot()  # says what is missing before the work, not after
    from sparsejax.evaluation.report import as_json, as_text
    from sparsejax.evaluation.runner import evaluate
    from sparsejax.models.loader import load_model

    model = load_model(config.model, config.dtype)
    if not args.lengths:
        suite = suite.within(model.config.max_position_embeddings - ROOM)
    tokenizer = find_tokenizer(config, model)
    found = evaluate(model, tokenizer, suite, policies, config, every_cell=args.every_cell, report=show_progress)
    print(as_text(found))
    if args.json:
        Path(args.json).write_text(json.dumps(as_json(found), indent=1) + "\n")
    if args.plot:
        plot.draw(found, args.plot)
    return 0


BUDGETS, QUICK_BUDGETS = ("0.25", "0.5"), ("0.25",)
QUICK_ENGINE = {"max_num_seqs": 33, "max_num_batched_tokens": 256, "num_decode_steps": 1}
"""Few step shapes: in a short run compiling more of them takes longer than they save."""
ROOM = 512
"""Tokens kept free for replies where the lengths were not asked for."""


def make_suite(args: argparse.Namespace) -> Any:
    """The suite that the flags describe."""
    from sparsejax.evaluation.suite import CASES, CORE, DEFAULT, QUICK

    named = {"core": CORE, "all": tuple(CASES)}
    given: dict[str, Any] = {"seed": args.seed}
    if args.cases:
        given["cases"] = tuple(dict.fromkeys(case for name in args.cases for case in named.get(name, (name,))))
    if args.lengths:
        given["lengths"] = tuple(sorted(set(args.lengths)))
    if args.samples is not None:
        given["samples"] = args.samples
    return dataclasses.replace(QUICK if args.quick else DEFAULT, **given)


def find_tokenizer(config: Any, model: Any) -> Any:
    """The tokenizer that the flags name, or the model's own."""
    from sparsejax.models.tokenizer import load_tokenizer

    if config.tokenizer is None and model.path is None:
        raise ModelError("the model has no tokenizer; name one with --tokenizer DIR")
    return load_tokenizer(config.tokenizer or model.path)


def show_progress(policy: Any, cell: Any) -> None:
    from sparsejax.evaluation.report import percent

    print(f"{policy.label}: {cell.case} at {cell.length} tokens: {percent(cell)}", file=sys.stderr, flush=True)
