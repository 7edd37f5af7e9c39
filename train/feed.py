"""Batches ahead of the step that needs them, so that the device never waits for the host."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from types import TracebackType

from train.data import Batch, make_batch
from train.documents import DocumentMaker
from train.lexicon import Lexicon
from train.recipe import Recipe

AHEAD = 2
"""Batches per worker that are made before they are asked for."""


def batch_at(recipe: Recipe, step: int) -> Batch:
    """The host batch of a step; it depends on the recipe's seed and the step number only."""
    stage = recipe.stage_at(step)
    return make_batch(
        DocumentMaker(_lexicon(), stage.mixture),
        (recipe.seed, step),
        stage.rows,
        stage.length,
        max_position=recipe.max_position,
        gap_share=stage.gap_share,
        language_weight=stage.language_weight,
    )


@cache
def _lexicon() -> Lexicon:
    return Lexicon()


class Feed:
    """The batches of steps `start` to `until`, in order, made by `workers` processes (0: by the caller, when asked).

    A context manager: leaving it ends the processes.
    """

    def __init__(self, recipe: Recipe, start: int, until: int, workers: int = 0) -> None:
        self.recipe, self.until = recipe, until
        self._next = start
        # Spawned, because a fork of a process that runs JAX's threads can hang.
        self._pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers else None
        self._ahead: deque[Future[Batch]] = deque()
        self._most = AHEAD * workers

    def take(self) -> Batch | None:
        """The next batch; None after the last."""
        if self._pool is None:
            if self._next == self.until:
                return None
            self._next += 1
            return batch_at(self.recipe, self._next - 1)
        while self._next < self.until and len(self._ahead) < self._most:
            self._ahead.append(self._pool.submit(batch_at, self.recipe, self._next))
            self._next += 1
        return self._ahead.popleft().result() if self._ahead else None

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
