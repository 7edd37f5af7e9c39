"""What each choice costs, one at a time: ``python -m train.ablation --out runs/ablation --json ablation.json``.

Compressors differ from a base in one setting. Each row has the share of bytes, the error of reconstruction and the
divergence of answers on sequences held out from it. All start from principal components; those that are to be trained
go through both stages. A run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from pallas_kernels.deltakv import Grid
from sparsejax.cache.plan import cache_bytes
from sparsejax.models.loader import LoadedModel
from train.calibrate import Rate, page_bytes, rates
from train.collect import add_arguments, collect_from, load_layers
from train.compressor import Settings, Trainer
from train.sensitivity import sensitivities

BASE = Settings(grid=Grid(neighbours=4), latent=32, inner=32, filter_layers=(0, 1), filter_codec="int4", layer_steps=0)
GRIDS: dict[str, dict[str, Any]] = {
    **{f"neighbours {count}": {"neighbours": count} for count in (1, 2, 8)},
    **{f"stride {stride}": {"stride": stride} for stride in (8, 32)},
    "latents int8": {"latents": "int8"},
    "latents not rounded": {"latents": "none"},
    "centers not rounded": {"centers": "none"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "keys and values alike": {"sensitivity": False},
    "g not refitted": {"refit": False},
    "filter layers int8": {"filter_codec": "int8"},
    "filter layer 0 only": {"filter_layers": (0,)},
}
WIDTHS: dict[str, dict[str, Any]] = {f"latent {width}": {"latent": width} for width in (16, 48, 64, 24)}
TRAINED: dict[str, dict[str, Any]] = {"trained": {}, "trained without rounding": {"rounding": False}}
RATES = "a width for each layer"
CHOICES = (8, 16, 24, 32, 40, 48, 64)
TOKENS = 131072


def variations(layer_steps: int, model_steps: int) -> dict[str, Settings]:
    """Settings by what is changed, the base first."""
    steps = {"layer_steps": layer_steps, "model_steps": model_steps}
    changes = WIDTHS | {name: steps | one for name, one in TRAINED.items()} | OTHERS
    made = {"base": BASE} | {name: dataclasses.replace(BASE, **one) for name, one in changes.items()} | {RATES: BASE}
    grids = {name: dataclasses.replace(BASE.grid, **one) for name, one in GRIDS.items()}
    return made | {name: dataclasses.replace(BASE, grid=grid) for name, grid in grids.items()}


def measure(model: LoadedModel, settings: Settings, out: Path, data: Any, metric: Any, held_out: int) -> dict[str, Any]:
    """One row: bytes, and what is lost on the sequences held out."""
    trainer = Trainer(model, settings, out, data, held_out=held_out, metric=metric)
    trainer.run()
    held = cache_bytes(model.config, settings.plan, TOKENS)
    return {"latent": settings.latent, "share": held["total"] / held["dense"], **trainer.evaluate()}


def measured(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that a file has of the same settings."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    rows = stored.pop("rows", [])
    return rows if stored == json.loads(json.dumps(result)) else []


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--out", required=True, help="folder for the collection and checkpoints")
    parser.add_argument("--json", required=True, help="file for the rows")
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--layer-steps", type=int, default=50)
    parser.add_argument("--model-steps", type=int, default=100)
    args = parser.parse_args()
    out = Path(args.out)
    model, _, facts = collect_from(args, out / "kv")
    data, metrics, path = load_layers(out / "kv"), {}, Path(args.json)
    base = {name: value for name, value in dataclasses.asdict(BASE).items() if value is not None}
    result = {"settings": vars(args), "base": base, "base_model": facts["base_model"]}
    rows = measured(path, result)
    for name, settings in variations(args.layer_steps, args.model_steps).items():
        if any(row["changed"] == name for row in rows):
            continue
        sparse = tuple(layer for layer in range(model.config.num_layers) if layer not in settings.filter_layers)
        if settings.sensitivity and sparse not in metrics:
            metrics[sparse] = sensitivities(model, data[0][: -args.held_out], sparse, settings.groups, settings.seed)
        metric = metrics[sparse] if settings.sensitivity else None
        if name == RATES:
            first = Trainer(model, settings, out / "start", data, held_out=args.held_out, metric=metric)
            codec = BASE.grid.latents
            budget = len(sparse) * page_bytes(model.config, BASE.grid, Rate(BASE.latent, codec))
            chosen = rates(first.pairs, metric, model.config, [Rate(width, codec) for width in CHOICES], budget)
            settings = dataclasses.replace(settings, latent=tuple(rate.width for rate in chosen.values()))
        row = measure(model, settings, out / name.replace(" ", "-"), data, metric, args.held_out)
        rows.append({"changed": name, **row})
        print(rows[-1], flush=True)
        path.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
