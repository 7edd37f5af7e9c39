"""The DeltaKV compressor of an engine: found and checked."""

from __future__ import annotations

from pathlib import Path

from sparsejax.cache.codecs.compressor import FACTS, Compressor, fingerprint, load_compressor
from sparsejax.errors import ConfigError
from sparsejax.models.loader import LoadedModel
from sparsejax.sparsity.policy import SparsityConfig

FOLDER = "deltakv"
"""Of a model, where a compressor lies that is made for it."""


def beside(model: str | Path | None) -> Path | None:
    """The compressor in a model's own folder, if there is one."""
    path = None if model is None else Path(model) / FOLDER
    return path if path is not None and (path / FACTS).exists() else None


def compressor_of(policy: SparsityConfig, model: LoadedModel, page_size: int) -> Compressor | None:
    """The compressor that a policy of the engine names, or that lies beside the model; None under other codecs.

    Raises:
        ConfigError: there is none, it has other pages, or a layer that it compresses sees a window only.
        ModelError: it cannot be used with this model; see `load_compressor`.
    """
    if policy.codec != "deltakv":
        return None
    path = policy.compressor or beside(model.path)
    if path is None:
        raise ConfigError(
            "codec='deltakv' needs a compressor trained for this model, and there is none beside it: train one "
            "(python -m train.deltakv) and give sparsity={'preset': 'deltakv', 'compressor': FOLDER}."
        )
    made = load_compressor(path, model.config, fingerprint(model.params))
    if made.grid.page_size != page_size:
        raise ConfigError(
            f"page_size={page_size}: the compressor in {path} codes pages of {made.grid.page_size} tokens; set "
            f"page_size={made.grid.page_size}, or train one for pages of {page_size}."
        )
    windowed = [layer for layer in made.sparse if model.config.windows[layer] is not None]
    if windowed:
        raise ConfigError(
            f"layers {windowed} of this model see a sliding window, and latents are read from the sequence's start: "
            "train a compressor that leaves these layers out."
        )
    return made
