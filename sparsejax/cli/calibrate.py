"""Choose the layers that select pages for the others (omnikv, turbo), and store them beside the model.

sparsejax calibrate --model DIR
sparsejax calibrate --model DIR --text FILE --lengths 4096 --filters 3 --dry-run
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsejax.cli import options, show
from sparsejax.errors import ConfigError

TASKS = ("niah_single", "niah_multikey", "kv", "qa")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument("--text", metavar="FILE", help="a text of your own; without one, documents of the evaluation")
    group.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of a text (default: 512 1024)")
    group.add_argument("--samples", type=int, default=4, metavar="N", help="documents of each task and length")
    group.add_argument("--share", type=float, default=0.25, metavar="S", help="share of the pages that lists hold")
    group.add_argument("--filters", type=int, default=3, metavar="N", help="filter layers (default: 3)")
    group.add_argument("--queries", type=int, default=16, metavar="N", help="last tokens that ask (default: 16)")
    group.add_argument("--dry-run", action="store_true", help="print the layers and store nothing")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measures how much of each layer's attention the others' lists hold, and stores the best layers."""
    config = options.make_config(args)
    from sparsejax.evaluation.coverage import best_filters, coverage, covered
    from sparsejax.models.loader import load_model
    from sparsejax.sparsity.calibration import write_filters
    from sparsejax.sparsity.policy import spread_filters

    model = load_model(config.model, config.dtype)
    texts = [text for length in args.lengths or (512, 1024) for text in read_texts(args, config, model, length)]
    share = coverage(model, texts, share=args.share, page_size=config.page_size, queries=args.queries)
    chosen, spread = best_filters(share, args.filters), spread_filters(len(share))
    layers = [str(layer) for layer in range(len(share))]
    rows = [("filter layer", *layers)] + [
        (layer, *(f"{value:.2f}" if j >= i else "" for j, value in enumerate(share[i])))
        for i, layer in enumerate(layers)
    ]
    print(f"Attention of each layer that lies in the {args.share:.0%} of the pages listed by a filter layer:")
    print(show.table(rows))
    print(f"chosen: {chosen}, which cover {covered(share, chosen):.3f} of the attention in the mean of the layers")
    print(f"without calibration: {spread}, which cover {covered(share, spread):.3f}")
    if not args.dry_run:
        facts = {"share": args.share, "page_size": config.page_size, "coverage": round(covered(share, chosen), 4)}
        print(f"stored in {write_filters(model.path, model, chosen, **facts, texts=len(texts))}")
    return 0


def read_texts(args: argparse.Namespace, config: Any, model: Any, length: int) -> list[list[int]]:
    """Token ids of the texts of one length."""
    from sparsejax.cli.eval import find_tokenizer
    from sparsejax.evaluation.tasks import make_sample

    tokenizer = find_tokenizer(config, model)
    if args.text:
        ids = tokenizer(Path(args.text).read_text(encoding="utf-8")).input_ids
        if len(ids) < length:
            raise ConfigError(f"--lengths {length}: the text has only {len(ids)} tokens.")
        return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][: args.samples]
    samples = (
        make_sample(task, length=length, seed=seed, tokenizer=tokenizer)
        for task in TASKS
        for seed in range(args.samples)
    )
    return [tokenizer(one.context + one.turns[0].prompt).input_ids for one in samples]
