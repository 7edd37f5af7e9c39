"""The whole chain on one checkpoint: ``python -m train.deltakv --out runs/deltakv``.

Collects keys and values, trains a compressor, exports it, reports what each layer stores and loses, and prints which
answers the model still gives when it reads compressed history: untrained (principal components), that with g refitted
on rounded latents, and trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels.deltakv import CODECS, Grid, Weights
from sparsejax.cache.codecs.compressor import Compressor, fingerprint, save_compressor
from sparsejax.cache.plan import cache_bytes
from sparsejax.cli import show
from sparsejax.evaluation.coverage import coverage
from sparsejax.evaluation.suite import make_cell
from sparsejax.models.loader import LoadedModel
from sparsejax.sparsity.calibration import read_filters
from sparsejax.sparsity.policy import spread_filters
from train.answers import exact_answers
from train.calibrate import Rate, nats, page_bytes, rates, refitted
from train.collect import add_arguments, collect_from, load_layers
from train.compressor import Settings, Trainer
from train.report import cells, draw, layer_rows

SHARE, QUERIES = 0.25, 16
"""Of the pages that a filter layer would list, and the last tokens that ask, where its coverage is measured."""
CASES = ("niah_multikey_dense", "kv_dense", "niah_multikey_dense_later", "kv_dense_later")


def compressors(trainer: Trainer, start: Mapping[str, Weights]) -> dict[str, dict[str, Weights]]:
    """Weights by name of layer: untrained, that with g refitted, and trained."""
    again = {name: refitted(one, trainer.pairs[name]) for name, one in start.items()}
    return {"untrained": dict(start), "untrained, g refitted": again, "trained": trainer.params}


def table(
    model: LoadedModel, tokenizer: Any, settings: Settings, made: Mapping[str, Mapping[str, Weights]], args: Any
) -> list[dict[str, Any]]:
    """Exact answers of each compressor, case and visibility; dense once."""
    rows, grids = [], settings.grids(model.config.num_layers)
    for case in args.cases:
        cell = make_cell(case, args.eval_length, args.samples, 0, tokenizer)
        for name, params in made.items():
            layers = [params.get(str(i)) for i in range(model.config.num_layers)]
            first = name == next(iter(made))
            for visibility in ("dense", "sealed", "raw_prompt") if first else ("sealed", "raw_prompt"):
                options = {"filter_codec": settings.filter_codec}
                right = exact_answers(model, tokenizer, cell, layers, grids, visibility, **options)
                label = "none" if visibility == "dense" else name
                rows.append(
                    {"case": case, "compressor": label, "visibility": visibility, "right": sum(right), "of": len(right)}
                )
                print(*rows[-1].values(), flush=True)
    return rows


def report(trainer: Trainer, start: Mapping[str, Weights]) -> dict[str, Any]:
    """`layer_rows` of a run that began with `start`, their table, which it prints, and what is lost in all; measured on
    the sequences held out."""
    size, texts = trainer.settings.grid.page_size, np.asarray(trainer.rest[0])
    share = coverage(trainer.model, texts, share=SHARE, page_size=size, queries=QUERIES)
    errors: dict[str, dict[str, float]] = {"components": {}, "trained": {}}
    if trainer.metric is not None:
        for label, params in (("components", start), ("trained", trainer.params)):
            found = {name: nats(one, trainer.held[name], trainer.metric[name]) for name, one in params.items()}
            errors[label] = found
    covers = [float(row[layer:].mean()) for layer, row in enumerate(share)]
    rows = layer_rows(trainer.settings, trainer.model.config, covers, **errors)
    printed = cells(rows)
    print(show.table(printed), flush=True)
    return {"held_out": trainer.evaluate(), "layers": rows, "table": printed}


def write(path: Path, result: Mapping[str, Any]) -> None:
    """As JSON."""
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--out", required=True, help="folder for the collection, checkpoints, export and results")
    parser.add_argument("--latent", type=int, default=64, help="width of latents, all KV heads together")
    parser.add_argument("--rates", type=int, nargs="+", metavar="WIDTH", help="choose a width for each layer of these")
    parser.add_argument("--rate-codecs", nargs="+", choices=CODECS, default=["int4"], help="and its codec of these")
    parser.add_argument("--rate-bytes", type=float, help="mean of a token and sparse layer; default: those of --latent")
    parser.add_argument("--inner", type=int, default=128, help="width inside f")
    parser.add_argument("--neighbours", type=int, default=4, help="references that a token's base averages")
    parser.add_argument("--filter-layers", type=int, nargs="+", help="default: as `sparsejax calibrate` measured")
    parser.add_argument("--filter-codec", default="int4", choices=("int8", "int4"))
    parser.add_argument("--layer-steps", type=int, default=200)
    parser.add_argument("--model-steps", type=int, default=0)
    parser.add_argument("--rows", type=int, default=jax.device_count(), help="sequences of a batch of the second stage")
    parser.add_argument("--refit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--sensitivity", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--eval-length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    if args.rates and not args.sensitivity:
        parser.error("--rates compares layers by what they do to answers: leave out --no-sensitivity")
    out = Path(args.out)
    model, tokenizer, facts = collect_from(args, out / "kv")
    settings = Settings(
        grid=Grid(neighbours=args.neighbours),
        latent=args.latent,
        inner=args.inner,
        filter_layers=tuple(args.filter_layers or read_filters(model) or spread_filters(model.config.num_layers)),
        filter_codec=args.filter_codec,
        layer_steps=args.layer_steps,
        model_steps=args.model_steps,
        rows=args.rows,
        refit=args.refit,
        sensitivity=args.sensitivity,
    )
    data = load_layers(out / "kv")
    first = Trainer(model, settings, out / "start", data)
    if args.rates:
        each = page_bytes(model.config, settings.grid, Rate(args.latent, settings.grid.latents))
        if args.rate_bytes is not None:
            each = args.rate_bytes * settings.grid.page_size
        choices = [Rate(width, codec) for width in args.rates for codec in args.rate_codecs]
        chosen = rates(first.pairs, first.metric, model.config, choices, int(each * len(first.pairs)))
        latent, codecs = zip(*chosen.values(), strict=True)
        settings = dataclasses.replace(settings, latent=latent, codecs=codecs)
        first = Trainer(model, settings, out / "start", data, metric=first.metric)
    trainer = Trainer(model, settings, out, data, metric=first.metric)
    trainer.run()
    draw(out / "log.csv", out / "loss.svg")
    made = compressors(trainer, first.params)
    grids = settings.plan.grids(model.config.num_layers)
    codecs = {layer: grid.latents for layer, grid in grids.items() if grid != settings.grid}
    final = Compressor(settings.grid, {int(name): weights for name, weights in made["trained"].items()}, codecs)
    save_compressor(out / "export", final, model.config, fingerprint(model.params))
    held = cache_bytes(model.config, settings.plan, 131072)
    share = held["total"] / held["dense"]
    print(f"{100 * share:.1f}% of the bytes of bfloat16 pages at 131072 tokens", flush=True)
    result = {"settings": vars(args), "base_model": facts["base_model"], "share_of_bytes": share}
    write(out / "report.json", result | report(trainer, first.params))
    write(out / "answers.json", result | {"rows": table(model, tokenizer, settings, made, args)})


if __name__ == "__main__":
    main()
