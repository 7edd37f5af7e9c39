"""From a checkpoint on disk to parameters: shard by shard, tensor by tensor, straight into fused arrays."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sparsejax.errors import ConfigError, ModelError
from sparsejax.models import checkpoint
from sparsejax.models.config import DecoderConfig
from sparsejax.models.families import family_named, family_of
from sparsejax.models.families.base import Slot, token_ids
from sparsejax.models.files import find_model, open_shards, read_json
from sparsejax.models.loaded import LoadedModel, require_finite, resolve_dtype
from sparsejax.models.params import param_shapes
from sparsejax.models.safetensors_file import DTYPES, SafetensorsFile

Place = Callable[[tuple[str, ...], np.ndarray], Any]

# Buffers that old exports saved although every reader recomputes them.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_ALIGNMENT = 64


def load_config(path: str | Path) -> DecoderConfig:
    """Reads ``config.json``; end-of-text ids come from ``generation_config.json`` where that has them.

    Raises:
        ModelError: the file is missing or invalid, the architecture is unknown (the known ones are listed),
            or a value is not supported.
    """
    path = find_model(path)
    if checkpoint.is_checkpoint(path):
        return checkpoint.read_config(path)
    raw = read_json(path / "config.json")
    try:
        if raw.get("quantization_config"):
            raise ConfigError("quantized checkpoints are not supported; load the unquantized one")
        cfg = family_of(raw).decode(raw)
    except ConfigError as error:
        raise ModelError(f"{path / 'config.json'}: {error}") from error
    generation = path / "generation_config.json"
    if generation.exists():
        eos = token_ids(read_json(generation).get("eos_token_id"))
        cfg = cfg.replace(eos_token_ids=eos or cfg.eos_token_ids)
    return cfg


def load_model(
    path_or_hub_id: str | Path | None,
    dtype: Any = "auto",
    *,
    progress: bool = False,
    check_finite: bool = False,
    place: Place | None = None,
) -> LoadedModel:
    """Loads a checkpoint: safetensors (single or sharded) with ``config.json``, or a converted one.

    Host memory peaks at the model in the target dtype plus one shard (mapped: the system may drop its pages).

    Args:
        path_or_hub_id: a directory, a hub id that is downloaded if no such directory exists, or None for the
            model inside the package.
        dtype: ``"auto"`` (as the checkpoint says), a dtype or its name.
        progress: shows a progress bar.
        check_finite: fail on NaN or infinite weights; reads every parameter once more.
        place: turns a finished host array and its path in the tree into what the tree holds; by default a
            JAX array on the default device.

    Raises:
        ModelError: anything wrong with the checkpoint; every missing, extra or misshaped tensor is named.
        ConfigError: ``dtype`` is not supported.
    """
    path = find_model(path_or_hub_id)
    if checkpoint.is_checkpoint(path):
        model = checkpoint.load_checkpoint(path, dtype)
    else:
        cfg = load_config(path)
        shards = open_shards(path)
        slots = {slot.name: slot for slot in family_named(cfg.family).slots(cfg)}
        _check_tensors(path, cfg, slots, shards)
        target = resolve_dtype(dtype, _stored_dtype(cfg, shards))
        params = _read(cfg, slots, shards, target, place or _to_device, progress)
        model = LoadedModel(dataclasses.replace(cfg, dtype=cfg.dtype or target.name), params, path, target)
    if check_finite:
        require_finite(model)
    return model


def _stored_dtype(cfg: DecoderConfig, shards: list[SafetensorsFile]) -> str:
    if cfg.dtype:
        return cfg.dtype
    return DTYPES[next(iter(shards[0].entries.values())).dtype].name


def _check_tensors(
    path: Path, cfg: DecoderConfig, slots: dict[str, Slot], shards: list[SafetensorsFile]
) -> None:
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    missing = [name for name in slots if name not in entries]
    extra = [name for name in entries if name not in slots and not _ignored(name, cfg)]
    both = [name for name in slots if name in entries]
    shapes = [
        f"{name} has {entries[name].shape}, expected {slots[name].shape}"
        for name in both
        if entries[name].shape != slots[name].shape
    ]
    dtypes = [f"{name} is {entries[name].dtype}" for name in both if entries[name].dtype not in DTYPES]
    problems = {
        "missing": missing,
        "not part of this architecture": extra,
        "misshaped": shapes,
        f"of a dtype that is not supported (supported: {', '.join(DTYPES)})": dtypes,
    }
    found = [
        f"{len(names)} tensors {what}:\n  " + "\n  ".join(names) for what, names in problems.items() if names
    ]
    if found:
        raise ModelError(
            f"the tensors in {path} do not fit its config.json ({cfg.architecture}); fix the config "
            "or download the checkpoint again.\n" + "\n".join(found)
        )


def _ignored(name: str, cfg: DecoderConfig) -> bool:
    return bool(_HARMLESS.search(name)) or (cfg.tie_embeddings and name == "lm_head.weight")


def _read(
    cfg: DecoderConfig,
    slots: dict[str, Slot],
    shards: Iterable[SafetensorsFile],
    dtype: np.dtype,
    place: Place,
    progress: bool,
) -> dict[str, Any]:
    shapes = param_shapes(cfg)
    params: dict[str, Any] = {name: {} for name in shapes if isinstance(shapes[name], dict)}
    parts_left = Counter(slot.path for slot in slots.values())
    building: dict[tuple[str, ...], np.ndarray] = {}
    total = sum(math.prod(slot.shape) for slot in slots.values()) * dtype.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for shard in shards:
            data = shard.open()
            for name in sorted(shard.entries.keys() & slots.keys(), key=lambda n: shard.entries[n].start):
                slot = slots[name]
                if slot.path not in building:
                    building[slot.path] = _aligned_empty(_at(shapes, slot.path), dtype)
                part = building[slot.path][slot.index]
                part[...] = shard.view(data, name).reshape(part.shape)
                bar.update(part.size * dtype.itemsize)
                del part
                parts_left[slot.path] -= 1
                if not parts_left[slot.path]:
                    leaf = place(slot.path, building.pop(slot.path))
                    _at(params, slot.path[:-1])[slot.path[-1]] = leaf
            del data
    return params


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _to_device(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
    return jax.device_put(array)
