"""The committed answers of transformers on the tiny checkpoints, and our answers to the same questions."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.models.decoder import Decoder
from sparsejax.models.dense import DenseCausal
from sparsejax.models.loaded import LoadedModel
from tests.models.cases import CASES
from tests.models.tiny import write_checkpoint

FOLDER = Path(__file__).resolve().parent.parent / "golden"
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Golden:
    """Greedy continuations of six prompts by transformers, in float32.

    Attributes:
        tokens: per prompt, the generated ids.
        logprobs: per prompt, the log-probability of each generated id.
    """

    case: str
    seed: int
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


def names() -> list[str]:
    """Every case."""
    return list(CASES)


def load(name: str, folder: Path = FOLDER) -> Golden:
    """The record of one case."""
    record = json.loads((folder / f"{name}.json").read_text())
    return Golden(**{field.name: record[field.name] for field in dataclasses.fields(Golden)})


def write_model(golden: Golden, path: Path) -> Path:
    """Writes the checkpoint that a record was made with into ``path``."""
    return write_checkpoint(path, CASES[golden.case] | {"seed": golden.seed})


def teacher_forced(model: LoadedModel, golden: Golden) -> tuple[np.ndarray, np.ndarray]:
    """Our greedy choice at each generated position after the peer's tokens, and our logprob of its token.

    Returns:
        tokens ``[6, new]`` int and logprobs ``[6, new]`` float32.
    """
    sequences = [prompt + tokens for prompt, tokens in zip(golden.prompts, golden.tokens, strict=True)]
    count, length = len(golden.tokens[0]), max(map(len, sequences))
    rows = np.array([sequence + [0] * (length - len(sequence)) for sequence in sequences])
    logits = np.asarray(_logits(model, rows))
    tokens, logprobs = [], []
    for row, prompt, expected in zip(logits, golden.prompts, golden.tokens, strict=True):
        answers = row[len(prompt) - 1 : len(prompt) - 1 + count]
        tokens.append(answers.argmax(-1))
        wide = answers.astype(np.float64)
        total = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
        logprobs.append(wide[np.arange(count), expected] - total)
    return np.stack(tokens), np.stack(logprobs).astype(np.float32)


def _logits(model: LoadedModel, rows: np.ndarray) -> jax.Array:
    decoder = Decoder(model.config, model.dtype)
    batch = types.SimpleNamespace(
        tokens=jnp.asarray(rows.reshape(-1)), positions=jnp.tile(jnp.arange(rows.shape[1]), rows.shape[0])
    )

    @jax.jit
    def run(params: dict) -> jax.Array:
        hidden, _ = decoder.apply({"params": params}, batch, DenseCausal.of(model.config, rows.shape[1]))
        return decoder.apply({"params": params}, hidden, method="logits")

    return run(model.params).reshape(*rows.shape, -1)
