"""Batches of training documents, made on the fly from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from train.documents import DocumentMaker


@dataclass(frozen=True)
class Batch:
    """Arrays of one step: tokens and positions ``[R, n]`` int32, and the learned targets.

    `rows` ``[R, S]`` int32 are the places whose next token is scored, `targets` ``[R, S]`` int32 those next tokens,
    `weights` ``[R, S]`` float32 their weights, `kinds` ``[R, S]`` int8 the task of a retrieval decision (or -1).
    """

    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray


def make_batch(
    maker: DocumentMaker,
    seed: tuple[int, ...],
    rows: int,
    length: int,
    *,
    max_position: int,
    gap_share: float = 0.0,
    language_weight: float = 0.02,
    scored_share: float = 0.375,
) -> Batch:
    """A batch from a seed: the same seed gives the same batch on every machine."""
    rng = random.Random(repr(seed))
    scored = int(length * scored_share)
    columns: list[tuple] = []
    for _ in range(rows):
        doc = maker.make(rng, length)
        learned = [index for index in range(length - 1) if doc.weights[index + 1] > 0.0]
        rest = [index for index in range(length - 1) if doc.weights[index + 1] == 0.0]
        if len(learned) > scored:
            learned = sorted(rng.sample(learned, scored))
        places = learned + rng.sample(rest, scored - len(learned))
        columns.append(
            (
                doc.tokens[:length],
                _positions(rng, length, max_position, gap_share),
                places,
                [doc.targets[index + 1] for index in places],
                [doc.weights[index + 1] or language_weight for index in places],
                [doc.kinds[index + 1] for index in places],
            )
        )
    dtypes = (np.int32, np.int32, np.int32, np.int32, np.float32, np.int8)
    return Batch(*(np.asarray(column, dtype) for column, dtype in zip(zip(*columns, strict=True), dtypes, strict=True)))


def _positions(rng: random.Random, length: int, max_position: int, gap_share: float) -> list[int]:
    """Positions with up to four random gaps, so that short documents train long distances."""
    if max_position <= length or rng.random() >= gap_share:
        return list(range(length))
    cuts = sorted(rng.sample(range(1, length), rng.randint(1, 4)))
    total = rng.randint(0, max_position - length)
    stops = sorted(rng.randint(0, total) for _ in cuts)
    out, offset, following = [], 0, dict(zip(cuts, stops, strict=True))
    for index in range(length):
        offset = following.get(index, offset)
        out.append(index + offset)
    return out
