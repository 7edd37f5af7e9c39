"""A training recipe: model shape, optimizer settings and a curriculum of stages, read from a JSON file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsejax.errors import ConfigError
from train.documents import Mixture


@dataclass(frozen=True)
class Stage:
    """A number of steps at one document length.

    A step sees ``rows`` documents, in micro-batches of ``micro_rows`` whose gradients are added up. The learning
    rate runs in a straight line from ``rate[0]`` to ``rate[1]``.
    """

    steps: int
    length: int
    rows: int
    micro_rows: int
    rate: tuple[float, float]
    mixture: Mixture = Mixture()
    gap_share: float = 0.0
    language_weight: float = 0.02

    def __post_init__(self) -> None:
        if self.rows % self.micro_rows:
            raise ConfigError(f"rows {self.rows} must be a multiple of micro_rows {self.micro_rows}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, but the devices it runs on."""

    stages: tuple[Stage, ...]
    shape: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    planted: bool = False  # start from `train.planting` instead of plain random matrices
    max_position: int = 4096
    adam_rate: float = 1.0
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 20

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that step number ``step`` (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ConfigError(f"step is {step} steps past the end of the recipe")

    def rate_knots(self) -> tuple[list[float], list[float]]:
        """Steps and learning rates between which the rate is linear."""
        at, rates, start = [0.0], [self.stages[0].rate[0] * 0.05], 0
        for index, stage in enumerate(self.stages):
            at += [start + (self.warmup if index == 0 else 0.5), start + max(stage.steps - 0.5, 1.0)]
            rates += list(stage.rate)
            start += stage.steps
        return at, rates


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe; unknown fields raise a `ConfigError` that names them."""
    raw = json.loads(Path(path).read_text())
    stages = []
    for entry in raw.pop("stages"):
        mixture = _build(Mixture, entry.pop("mixture", {}))
        rate = entry.pop("rate")
        rate = tuple(rate) if isinstance(rate, list) else (rate, rate)
        stages.append(_build(Stage, entry | {"mixture": mixture, "rate": rate}))
    return _build(Recipe, raw | {"stages": tuple(stages)})


def _build(kind: type, values: dict[str, Any]) -> Any:
    known = {one.name for one in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"unknown {kind.__name__} fields {unknown}; known are {sorted(known)}")
    return kind(**values)
