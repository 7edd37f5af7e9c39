"""A model in memory, and the dtype names that loading accepts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.errors import ConfigError, ModelError
from sparsejax.models.config import DecoderConfig

_NAMES = {
    "float32": jnp.float32,
    "float": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "half": jnp.float16,
    "float64": jnp.float32,
}
ALLOWED_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What loading returns: configuration, parameters, where they came from and their dtype."""

    config: DecoderConfig
    params: dict[str, Any]
    path: Path
    dtype: np.dtype


def resolve_dtype(dtype: Any, stored: Any = None) -> np.dtype:
    """The dtype to load in. ``"auto"`` means ``stored``, the checkpoint's own (float64 becomes float32)."""
    wanted = stored if dtype is None or dtype == "auto" else dtype
    name = wanted.removeprefix("torch.") if isinstance(wanted, str) else _dtype_name(wanted)
    if name not in _NAMES:
        raise ConfigError(f"dtype {wanted!r} is not supported; use one of {', '.join(ALLOWED_DTYPES)}")
    return np.dtype(_NAMES[name])


def _dtype_name(dtype: Any) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def nonfinite_tensors(params: dict[str, Any]) -> dict[str, int]:
    """How many NaN or infinite values each parameter holds, by its path; empty if all are finite."""
    bad = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        count = int(jnp.sum(~jnp.isfinite(leaf)))
        if count:
            bad["/".join(key.key for key in path)] = count
    return bad


def require_finite(model: LoadedModel) -> None:
    """Raises ModelError that names every parameter with NaN or infinite values."""
    bad = nonfinite_tensors(model.params)
    if bad:
        listed = "\n".join(f"  {name}: {count} values" for name, count in bad.items())
        raise ModelError(
            f"{model.path} holds NaN or infinite weights; download or export it again:\n{listed}"
        )
