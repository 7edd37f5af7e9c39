"""What a run of `train.deltakv` has to show: a table of its layers, and a picture of its losses."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.evaluation.plot import load_pyplot

if TYPE_CHECKING:
    from sparsejax.models.config import DecoderConfig
    from train.compressor import Settings

HEADER = ("layer", "role", "covers", "width", "codec", "bytes per token", "components, nats", "trained, nats")


def layer_rows(
    settings: Settings, cfg: DecoderConfig, covers: Sequence[float], **errors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """How each layer is stored, what it `covers` of the attention of itself and later layers where it chooses pages for
    them, and its `errors` by layer, none for filter layers."""
    plan, layers = settings.plan, cfg.num_layers
    widths, grids = plan.widths(layers), plan.grids(layers)
    held = [layout.page_bytes / plan.grid.page_size for layout in plan.group(cfg, "bfloat16", 1, 1).layouts]
    return [
        {
            "layer": layer,
            "role": "sparse" if layer in widths else "filter",
            "coverage": covers[layer],
            "width": widths.get(layer),
            "codec": grids[layer].latents if layer in grids else plan.filter_codec,
            "bytes_per_token": held[layer],
        }
        | {name: by_layer.get(str(layer)) for name, by_layer in errors.items()}
        for layer in range(layers)
    ]


def cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table of `layer_rows` with `components` and `trained`, and a last row that sums it up."""

    def nats(value: float | None) -> str:
        return "" if value is None else f"{value:.6f}"

    made = [HEADER]
    for row in rows:
        size = (f"{row['coverage']:.2f}", str(row["width"] or ""), row["codec"], f"{row['bytes_per_token']:.1f}")
        made.append((str(row["layer"]), row["role"], *size, nats(row["components"]), nats(row["trained"])))
    known = [row for row in rows if row["trained"] is not None]
    total = [nats(sum(row[name] for row in known)) if known else "" for name in ("components", "trained")]
    return [*made, ("all", "", "", "", "", f"{sum(row['bytes_per_token'] for row in rows):.1f}", *total)]


def draw(log: str | Path, path: str | Path) -> None:
    """A picture of the losses in a run's ``log.csv``; needs matplotlib."""
    pyplot = load_pyplot()
    with Path(log).open() as file:
        rows = [row for row in csv.DictReader(file)]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label in (("error", "relative error"), ("divergence", "divergence from dense, nats")):
        known = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        axes.plot(*zip(*known, strict=True), "o-", label=f"held-out {label}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
