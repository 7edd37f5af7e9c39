"""Converted checkpoints: our fused parameter tree through orbax, with the configuration beside it.

Restoring skips the fusing of q, k, v and gate, up, and reads in parallel. A directory holds ``decoder.json``
(format marker and DecoderConfig), ``params/`` (orbax), and the tokenizer files if any were given.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from sparsejax.errors import ConfigError, ModelError, StoreError
from sparsejax.models.config import DecoderConfig, RopeConfig
from sparsejax.models.files import read_json
from sparsejax.models.loaded import LoadedModel, resolve_dtype
from sparsejax.models.params import param_shapes

_CONFIG = "decoder.json"
_PARAMS = "params"
_FORMAT = "sparsejax-decoder"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a directory that ``save_checkpoint`` wrote."""
    return (Path(path) / _CONFIG).is_file()


def save_checkpoint(
    path: str | Path,
    cfg: DecoderConfig,
    params: dict[str, Any],
    *,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes parameters and configuration into the directory ``path``.

    Args:
        tokenizer_from: a directory whose tokenizer files are copied along, so that the result is complete.
        overwrite: replaces a converted checkpoint that is there already.

    Raises:
        StoreError: ``path`` is in use or cannot be written.
    """
    import orbax.checkpoint as ocp

    path = Path(path).expanduser().absolute()
    if path.exists() and any(path.iterdir()) and not (overwrite and is_checkpoint(path)):
        hint = "pass overwrite=True to replace it" if is_checkpoint(path) else "give an empty directory"
        raise StoreError(f"{path} is not empty; {hint}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / _CONFIG).unlink(missing_ok=True)
        with ocp.StandardCheckpointer() as saver:
            saver.save(path / _PARAMS, params, force=overwrite)
        for pattern in _TOKENIZER_FILES if tokenizer_from is not None else ():
            for file in Path(tokenizer_from).glob(pattern):
                shutil.copy2(file, path / file.name)
        content = {
            "format": _FORMAT,
            "config": dataclasses.asdict(cfg),
            "dtype": resolve_dtype(_dtype_of(params)).name,
        }
        (path / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write a checkpoint to {path}: {error.strerror or error}") from error
    return path


def read_config(path: str | Path) -> DecoderConfig:
    """The configuration of a converted checkpoint. Raises ModelError if it is damaged."""
    return _read(Path(path))[0]


def load_checkpoint(
    path: str | Path, dtype: Any = "auto", *, sharding: jax.sharding.Sharding | None = None
) -> LoadedModel:
    """Restores a converted checkpoint onto the default device, or as ``sharding`` says.

    Raises:
        ModelError: the directory is damaged or its arrays do not fit its configuration.
    """
    import orbax.checkpoint as ocp

    path = Path(path).expanduser().absolute()
    cfg, stored = _read(path)
    target = resolve_dtype(dtype, stored)
    place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, target, sharding=place),
        param_shapes(cfg),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    try:
        with ocp.StandardCheckpointer() as reader:
            params = reader.restore(path / _PARAMS, wanted)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the converted checkpoint in {path} is damaged; convert it again ({error})"
        ) from error
    return LoadedModel(cfg, params, path, target)


def _dtype_of(params: dict[str, Any]) -> Any:
    return jax.tree.leaves(params)[0].dtype


def _read(path: Path) -> tuple[DecoderConfig, str]:
    content = read_json(path / _CONFIG)
    try:
        if content["format"] != _FORMAT:
            raise ConfigError(f"format is {content['format']!r}, expected {_FORMAT!r}")
        fields = dict(content["config"])
        fields["rope"] = RopeConfig(**fields["rope"])
        fields["windows"] = tuple(fields["windows"])
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return DecoderConfig(**fields), content["dtype"]
    except (KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"{path / _CONFIG} is damaged ({error}); convert the checkpoint again") from error
