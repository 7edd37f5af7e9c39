"""Writing a model in the Hugging Face layout: the inverse of the loader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from sparsejax.models.config import DecoderConfig
from sparsejax.models.families import family_named
from sparsejax.models.families.base import Slot, encode_common
from sparsejax.models.files import INDEX, SINGLE
from sparsejax.models.loaded import resolve_dtype


def save_pretrained(
    path: str | Path,
    cfg: DecoderConfig,
    params: dict[str, Any],
    dtype: Any = None,
    *,
    max_shard_bytes: int | None = None,
) -> Path:
    """Writes ``config.json`` and safetensors into the directory ``path`` (made if absent).

    Args:
        dtype: dtype on disk; None keeps that of the parameters.
        max_shard_bytes: starts a new shard before a file would exceed this; None writes one file.

    Raises:
        ConfigError: the family's format cannot express ``cfg``, or ``dtype`` is not supported.
    """
    path = Path(path)
    target = resolve_dtype(dtype or jax.tree.leaves(params)[0].dtype)
    config = _config_json(cfg, target)
    path.mkdir(parents=True, exist_ok=True)
    groups = _shards(family_named(cfg.family).slots(cfg), target.itemsize, max_shard_bytes)
    names = [SINGLE]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for name, slots in zip(names, groups, strict=True):
        tensors = {slot.name: _tensor(params, slot, target) for slot in slots}
        save_file(tensors, path / name, metadata={"format": "pt"})
    if len(groups) > 1:
        weight_map = {slot.name: name for name, slots in zip(names, groups, strict=True) for slot in slots}
        total = sum(_size(slot) for slots in groups for slot in slots) * target.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path / INDEX, index)
    _write_json(path / "config.json", config)
    return path


def _config_json(cfg: DecoderConfig, dtype: np.dtype) -> dict[str, Any]:
    family = family_named(cfg.family)
    return encode_common(cfg) | {"model_type": family.model_type, "dtype": dtype.name} | family.encode(cfg)


def _size(slot: Slot) -> int:
    return math.prod(slot.shape)


def _shards(slots: list[Slot], itemsize: int, limit: int | None) -> list[list[Slot]]:
    groups: list[list[Slot]] = [[]]
    used = 0
    for slot in slots:
        size = _size(slot) * itemsize
        if limit is not None and groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(slot)
        used += size
    return groups


def _tensor(params: dict[str, Any], slot: Slot, dtype: np.dtype) -> np.ndarray:
    leaf: Any = params
    for key in slot.path:
        leaf = leaf[key]
    part = np.asarray(leaf)[slot.index].reshape(slot.shape)
    return np.ascontiguousarray(part, dtype=dtype)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
