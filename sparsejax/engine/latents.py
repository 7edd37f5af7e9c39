"""The DeltaKV compressor of an engine: found, checked, and turned into a plan of the cache."""

from __future__ import annotations

from pathlib import Path

from sparsejax.cache.codecs.compressor import FACTS, Compressor, fingerprint, load_compressor
from sparsejax.cache.plan import Plan
from sparsejax.errors import ConfigError
from sparsejax.models.loader import LoadedModel
from sparsejax.sparsity.policy import SparsityConfig

FOLDER = "deltakv"
"""Of a model, where a compressor lies that is made for it."""


def compressor_of(policy: SparsityConfig, model: LoadedModel, page_size: int) -> Compressor | None:
    """The compressor that a policy of the engine names, or that lies beside the model; None under other codecs.

    Raises:
        ConfigError: there is none, it has other pages, or a layer that it compresses sees a window only.
        ModelError: it cannot be used with this model; see `load_compressor`.
    """
    if policy.codec != "deltakv":
        return None
    path = policy.compressor
    if path is None:
        path = None if model.path is None else Path(model.path) / FOLDER
        if path is None or not (path / FACTS).exists():
            raise ConfigError(
                f"codec='deltakv' needs a compressor trained for this model, and there is none in {path or 'memory'}: "
                "train one (python -m train.deltakv) and give sparsity={'preset': 'deltakv', 'compressor': FOLDER}."
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


def plan_of(compressor: Compressor, num_layers: int, filter_codec: str | None) -> Plan:
    """How a model with this compressor stores its cache."""
    shapes = [compressor.layers[layer]["g"].shape for layer in compressor.sparse]
    filters = tuple(layer for layer in range(num_layers) if layer not in compressor.layers)
    latents = tuple(groups * latent for groups, _, latent in shapes)
    return Plan(compressor.grid, latents, filters, filter_codec or "int4", shapes[0][0])
