"""Filter layers that were measured for a model, in a file beside its checkpoint; see `sparsejax calibrate`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsejax.cache.codecs.compressor import fingerprint
from sparsejax.errors import ModelError
from sparsejax.models.files import read_json
from sparsejax.models.loaded import LoadedModel
from sparsejax.sparsity.policy import SparsityConfig

FILE = "filter_layers.json"


def write_filters(folder: Path, model: LoadedModel, layers: Sequence[int], **measured: Any) -> Path:
    """Stores filter layers of `model` in `folder`, with what was measured; returns the file."""
    facts = {"base_model": fingerprint(model.params), "filter_layers": list(layers), **measured}
    (folder / FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return folder / FILE


def read_filters(model: LoadedModel) -> tuple[int, ...] | None:
    """The filter layers stored beside the checkpoint of `model`; None where it has no such file.

    Raises:
        ModelError: the file was made for other weights, or names layers that a model cannot have.
    """
    if model.path is None or not (model.path / FILE).exists():
        return None
    path, last = model.path / FILE, model.config.num_layers - 1
    facts = read_json(path)
    layers = facts.get("filter_layers")
    plain = isinstance(layers, list) and all(isinstance(layer, int) and 0 <= layer <= last for layer in layers)
    if not plain or not layers or layers != sorted(set(layers)):
        raise ModelError(
            f"{path} has filter_layers={layers!r}; it must list layers from 0 to {last} in ascending order: run "
            "`sparsejax calibrate` for this model again, or delete the file."
        )
    if facts.get("base_model") != fingerprint(model.params):
        raise ModelError(
            f"{path} was measured on other weights than those beside it: run `sparsejax calibrate` for this model "
            "again, or delete the file to spread three filter layers over the depth."
        )
    return tuple(layers)


def with_filters(policy: SparsityConfig, measured: Callable[[], tuple[int, ...] | None]) -> SparsityConfig:
    """The policy with the `measured` filter layers where it says ``"auto"``; asked for only then."""
    layers = measured() if policy.filter_layers == "auto" else None
    return policy if layers is None else policy.settled(layers)
