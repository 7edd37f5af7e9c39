"""Finding a model's files: a local directory or a hub id, its JSON files and its shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsejax.errors import ModelError
from sparsejax.models.safetensors_file import SafetensorsFile, read_header

EMBEDDED = Path(__file__).parent / "embedded"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def find_model(path_or_hub_id: str | Path | None) -> Path:
    """The directory of a model: None is the one inside the package, a hub id that is no local path is
    downloaded, or found in the hub's cache."""
    if path_or_hub_id is None:
        return EMBEDDED
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"{path} is a file; give the directory that holds config.json and the safetensors files"
        )
    text = str(path_or_hub_id)
    if not _HUB_ID.fullmatch(text):
        raise ModelError(f"there is no directory {text!r}, and it is not a hub id (like 'owner/name') either")
    return _download(text)


def _download(hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_WANTED))
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.HFValidationError) as error:
        raise ModelError(
            f"there is no directory {hub_id!r}, and the hub has no such model that you may read; check the "
            "name, or log in with `hf auth login` if it is private or gated"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise ModelError(
            f"there is no directory {hub_id!r}, and the hub cannot be reached to download a model of that "
            f"name ({type(error).__name__}); give a local directory, or connect and try again"
        ) from error


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object. Raises ModelError if the file is missing, unreadable or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = (
            ", ".join(sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else "nothing"
        )
        raise ModelError(f"{path} is missing; the directory holds: {there or 'nothing'}") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def open_shards(path: Path) -> list[SafetensorsFile]:
    """Checked headers of every shard of the checkpoint in ``path``, in file order."""
    if (path / SINGLE).exists():
        return [read_header(path / SINGLE)]
    if not (path / INDEX).exists():
        there = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise ModelError(
            f"{path} has neither {SINGLE} nor {INDEX}; it holds: {there}. Other weight formats must "
            "be converted to safetensors first"
        )
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{path / INDEX} lacks a 'weight_map' from tensor names to file names")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if Path(name).name != name or not (path / name).is_file()]
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}; download them"
        )
    shards = [read_header(path / name) for name in names]
    _check_index(path, weight_map, shards)
    return shards


def _check_index(path: Path, weight_map: dict[str, str], shards: list[SafetensorsFile]) -> None:
    held = {shard.path.name: shard.entries for shard in shards}
    absent = [f"{name} (in {file})" for name, file in weight_map.items() if name not in held[file]]
    if absent:
        raise ModelError(f"{path}: shards lack tensors that {INDEX} places in them: {', '.join(absent)}")
    seen: dict[str, str] = {}
    for file, entries in held.items():
        for name in entries:
            if name in seen:
                raise ModelError(f"{path}: tensor {name!r} is in two shards, {seen[name]} and {file}")
            seen[name] = file
