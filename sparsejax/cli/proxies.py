"""`sparsejax eval --proxies`: what policies lose inside the model, on any checkpoint and text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsejax.cli import options, show
from sparsejax.errors import ConfigError

HEAD = ("policy", "mass recall", "worst layer", "output error", "KL mean", "p99", "max", "same top token", "diverges")


def run(args: argparse.Namespace, policies: Sequence[Any]) -> int:
    """Probes the model on the file's text, at every length, and prints a table for each."""
    from sparsejax.cli.eval import find_tokenizer
    from sparsejax.evaluation.probe import probe
    from sparsejax.models.loader import load_model

    config = options.make_config(args)
    if not args.text:
        raise ConfigError("--proxies reads a text: name a file with --text FILE.")
    model = load_model(config.model, config.dtype)
    token_ids = find_tokenizer(config, model)(Path(args.text).read_text()).input_ids
    stored = []
    for length in args.lengths or (min(1024, len(token_ids)),):
        if length > len(token_ids):
            raise ConfigError(f"--lengths {length}: the text has only {len(token_ids)} tokens.")
        found, refused = probe(
            model, token_ids[:length], policies, steps=args.steps, config=config, report=_progress(length)
        )
        print(f"{length - args.steps} tokens read, {args.steps} decoded one by one, compared with dense attention:")
        print(show.table([HEAD, *map(row, found)]))
        for policy, reason in refused:
            print(f"  {policy.label} was left out: {reason}")
        stored.append({"length": length, "steps": args.steps, "policies": [as_json(one) for one in found]})
    if args.json:
        Path(args.json).write_text(json.dumps(stored, indent=1) + "\n")
    return 0


def as_json(found: Any) -> dict[str, Any]:
    """The numbers of one policy; recall and error are means over decoded tokens and query heads, by layer."""
    return {
        "policy": found.policy.label,
        "recall": found.recall.mean((1, 2)).tolist(),
        "error": found.error.mean((1, 2)).tolist(),
        "divergence": dict(zip(("mean", "p99", "max"), found.divergences, strict=True)),
        "agreement": found.agreement,
        "first_divergence": found.first_divergence,
    }


def row(found: Any) -> tuple[str, ...]:
    """A line of the table."""
    by_layer = found.recall.mean((1, 2))
    return (
        found.policy.label,
        f"{by_layer.mean():.3f}",
        f"{by_layer.min():.3f} (layer {by_layer.argmin()})",
        f"{found.error.mean():.3f}",
        *(f"{value:.2g}" for value in found.divergences),
        f"{found.agreement:.0%}",
        "never" if found.first_divergence is None else f"at token {found.first_divergence}",
    )


def _progress(length: int) -> Any:
    return lambda found: print(f"{found.policy.label} at {length} tokens is done", file=sys.stderr, flush=True)
