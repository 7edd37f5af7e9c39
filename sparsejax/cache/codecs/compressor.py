"""A trained DeltaKV compressor on disk: one safetensors file and a JSON file that says what it was made for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from pallas_kernels.deltakv import CODECS, Grid, Weights
from sparsejax.errors import ModelError
from sparsejax.models.config import DecoderConfig
from sparsejax.models.files import read_json
from sparsejax.models.safetensors_file import read_header

TENSORS, FACTS = "compressor.safetensors", "compressor.json"
SAMPLED = 64
"""Values of each parameter that the fingerprint of a model looks at."""


@dataclasses.dataclass(frozen=True)
class Compressor:
    """Weights of each sparse layer (see `pallas_kernels.deltakv.compress`) and the grid they were trained with.

    `codecs` names how a layer's latents are stored, where not as the grid says.
    """

    grid: Grid
    layers: dict[int, Weights]
    codecs: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def sparse(self) -> tuple[int, ...]:
        return tuple(sorted(self.layers))

    @property
    def facts(self) -> tuple[Grid, dict[int, tuple[int, ...]], Mapping[int, str]]:
        """What `read_shapes` gives of its file."""
        return self.grid, {layer: weights["g"].shape for layer, weights in self.layers.items()}, self.codecs


def fingerprint(params: dict[str, Any]) -> str:
    """A hash of a model's parameters: names, shapes and evenly spaced values in bfloat16, so that a checkpoint has
    one fingerprint in every dtype."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat = leaf.reshape(-1)
        values = np.asarray(flat[np.linspace(0, flat.size - 1, SAMPLED).astype(np.int64)])
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        digest.update(values.astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _facts(cfg: DecoderConfig, base: str) -> dict[str, Any]:
    """What a compressor and a model must agree in."""
    names = ("num_layers", "num_kv_heads", "head_dim")
    return {name: getattr(cfg, name) for name in names} | {"base_model": base}


def save_compressor(path: str | Path, compressor: Compressor, cfg: DecoderConfig, base: str) -> Path:
    """Writes a compressor made for the model of `cfg` with fingerprint `base` into the directory `path`."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"layers.{layer}.{name}": np.ascontiguousarray(value, np.float32)
        for layer, weights in compressor.layers.items()
        for name, value in weights.items()
    }
    save_file(tensors, path / TENSORS)
    listed = {name: list(value.shape) for name, value in sorted(tensors.items())}
    facts = {"model": _facts(cfg, base), "grid": dataclasses.asdict(compressor.grid), "tensors": listed}
    if compressor.codecs:
        facts["codecs"] = {str(layer): codec for layer, codec in compressor.codecs.items()}
    (path / FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def load_compressor(path: str | Path, cfg: DecoderConfig, base: str) -> Compressor:
    """Reads a compressor for the model of `cfg` with fingerprint `base`.

    Raises:
        ModelError: it was made for another model or other dimensions, a file is missing, truncated or damaged, or a
            tensor is missing, misshaped or not finite; the message names each difference.
    """
    path = Path(path)
    facts = _read_facts(path)
    wanted, made = _facts(cfg, base), facts["model"]
    differing = [
        f"{name} {made.get(name)} (the model has {value})" for name, value in wanted.items() if made.get(name) != value
    ]
    if differing:
        raise ModelError(f"the compressor in {path} was trained for another model: {'; '.join(differing)}")
    grid = _grid(path, facts)
    file = read_header(path / TENSORS)
    bad = [
        f"{name} is {list(file.entries[name].shape) if name in file.entries else 'missing'}, not {shape}"
        for name, shape in facts["tensors"].items()
        if name not in file.entries or list(file.entries[name].shape) != shape
    ]
    if bad:
        raise ModelError(f"{path / TENSORS} does not fit its {FACTS}: {'; '.join(bad)}")
    data, layers = file.open(), {}
    for name in facts["tensors"]:
        value = np.array(file.view(data, name), np.float32)
        if not np.isfinite(value).all():
            raise ModelError(f"{path / TENSORS}: {name} holds {(~np.isfinite(value)).sum()} values that are not finite")
        _, layer, part = name.split(".")
        layers.setdefault(int(layer), {})[part] = jnp.asarray(value)
    width = 2 * cfg.num_kv_heads * cfg.head_dim
    for layer, weights in layers.items():
        groups, found, _ = weights["g"].shape
        if groups * found != width:
            raise ModelError(f"{path}: layer {layer} reads vectors of {groups * found}, the model has {width}")
    return Compressor(grid, layers, _codecs(path, facts, layers))


def read_shapes(path: str | Path) -> tuple[Grid, dict[int, tuple[int, ...]], Mapping[int, str]]:
    """The grid of a compressor on disk, the shape [A, W, C] of g of each of its layers, and the codecs of layers whose
    latents are not stored as the grid says; weights are not read.

    Raises:
        ModelError: it is missing, or does not say what it is.
    """
    path = Path(path)
    facts = _read_facts(path)
    named = {name.split(".")[1]: tuple(shape) for name, shape in facts["tensors"].items() if name.endswith(".g")}
    shapes = {int(layer): shape for layer, shape in named.items()}
    return _grid(path, facts), shapes, _codecs(path, facts, shapes)


def _read_facts(path: Path) -> dict[str, Any]:
    facts = read_json(path / FACTS)
    if not {"model", "grid", "tensors"} <= facts.keys():
        raise ModelError(f"{path / FACTS} must say model, grid and tensors; it says {sorted(facts)}: export it again")
    return facts


def _grid(path: Path, facts: dict[str, Any]) -> Grid:
    try:
        return Grid(**facts["grid"])
    except (TypeError, ValueError) as error:
        raise ModelError(f"the grid in {path / FACTS} cannot be used: {error}") from error


def _codecs(path: Path, facts: dict[str, Any], layers: Collection[int]) -> dict[int, str]:
    """Codecs by layer; a file without any stores the latents of all layers as its grid says."""
    codecs, names = facts.get("codecs", {}), {str(layer): layer for layer in layers}
    if not isinstance(codecs, dict) or not codecs.keys() <= names.keys():
        raise ModelError(
            f"codecs in {path / FACTS} must be named by layers among {sorted(layers)}; got {codecs!r}: export it again"
        )
    for layer, codec in codecs.items():
        if codec not in CODECS:
            raise ModelError(
                f"layer {layer} in {path / FACTS} has latents in {codec!r}; they can be {', '.join(CODECS)}: "
                "export it again"
            )
    return {names[layer]: codec for layer, codec in codecs.items()}
