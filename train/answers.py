"""Exact answers without an engine: correct replies are fed, and each of their tokens must be the model's first choice.

Greedy decoding gives a reply exactly if that holds for all of its tokens (the line's end is not asked for). Queries
read the prompt under one of three visibilities: ``dense`` (all raw), ``sealed`` (earlier pages compressed throughout)
and ``raw_prompt`` (raw until the prompt is read, or, with a question that comes later, until the document is).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.deltakv import Grid, Weights
from sparsejax.errors import ConfigError
from sparsejax.evaluation.suite import Cell
from sparsejax.models.decoder import Decoder
from sparsejax.models.loader import LoadedModel
from train.history import CompressedHistory

VISIBILITIES = ("dense", "sealed", "raw_prompt")


@functools.partial(jax.jit, static_argnames=("config", "dtype", "grids", "codec"))
def _right(config, dtype, grids, codec, params, layers, tokens, first, last, raw_until):  # noqa: ANN001
    """Whether tokens first + 1 .. last of a sequence [n] are each predicted, and how many of them are."""
    history = CompressedHistory(layers, raw_until[None], grids, len(tokens), codec)
    place = jnp.arange(len(tokens), dtype=jnp.int32)
    decoder = Decoder(config, dtype)
    hidden, _ = decoder.apply({"params": params}, SimpleNamespace(tokens=tokens, positions=place), history)
    asked = first + jnp.arange(16)
    logits = decoder.apply({"params": params}, hidden[asked], method="logits")
    hit = (logits.argmax(-1) == tokens[asked + 1]) | (asked >= last)
    return hit.all()


def exact_answers(
    model: LoadedModel,
    tokenizer: Any,
    cell: Cell,
    layers: Sequence[Weights | None],
    grids: Sequence[Grid],
    visibility: str,
    *,
    filter_codec: str = "int8",
) -> list[bool]:
    """One outcome per request of the cell, by teacher forcing; see the module and `CompressedHistory`."""
    if visibility not in VISIBILITIES:
        raise ConfigError(f"visibility {visibility!r} is unknown; use one of {', '.join(VISIBILITIES)}")
    size = grids[0].page_size
    length = -(-(cell.length + 32) // size) * size
    outcomes = []
    for request in cell.requests:
        reply = tokenizer(request.turn.reply.rstrip(), add_special_tokens=False).input_ids
        tokens = np.zeros(length, np.int32)
        last = len(request.token_ids) + len(reply) - 1
        tokens[: last + 1] = [*request.token_ids, *reply]
        raw_until = {"dense": length, "sealed": 0, "raw_prompt": request.compress_at}[visibility]
        settings = (model.config, model.dtype, tuple(grids), filter_codec)
        scalars = (np.int32(len(request.token_ids) - 1), np.int32(last), np.int32(raw_until))
        outcomes.append(bool(_right(*settings, model.params, tuple(layers), tokens, *scalars)))
    return outcomes
