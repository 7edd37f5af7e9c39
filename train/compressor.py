"""DeltaKV compressors: a start by principal components, and training in two stages on a frozen model.

Stage ``layers`` fits each layer's reconstruction on collected keys and values: quick, since references do not depend on
the compressor. Between the stages g is refitted. Stage ``model`` runs the whole frozen model over compressed history
(the grid, open pages and rounding of serving). Its loss is the divergence of next-token distributions from those of the
same model read densely, plus the reconstruction of every layer. (arXiv 2602.08005 takes next-token loss; that falls,
too, where the compressor teaches the model its training texts, and then answers are lost elsewhere.)

Each stage ends with the parameters that did best on sequences held out from it, its start among them, so that no stage
ends worse than it began. Interrupted runs go on where their last checkpoint was written.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float

from pallas_kernels.deltakv import Grid, Weights
from sparsejax.cache.plan import Plan
from sparsejax.models.decoder import Decoder
from sparsejax.models.dense import DenseCausal
from sparsejax.models.loader import LoadedModel
from train.calibrate import refitted
from train.history import CompressedHistory
from train.pairs import Pairs, mean_error, pairs_of, principal
from train.sensitivity import sensitivities
from train.spread import Spread

COLUMNS = ("step", "stage", "loss", "error", "divergence")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a run; a stage's rate warms up over `warmup` of its steps and falls to a tenth by a cosine.

    `latent` is the width of every sparse layer, or one for each in their order, and `codecs` how each stores it, if not
    as the grid says (see `train.calibrate.rates`). `reconstruction` weighs the error of reconstruction
    in stage ``model``, where the divergence has weight 1. With `sensitivity` errors of vectors count by what they do to
    the model's answers (see `train.sensitivity`), without it keys and values alike.
    """

    grid: Grid = Grid()
    latent: int | tuple[int, ...] = 64
    inner: int = 128
    groups: int = 1
    filter_layers: tuple[int, ...] = (0,)
    layer_steps: int = 200
    model_steps: int = 0
    pages: int = 32
    rows: int = 1
    rate: float = 2e-4
    model_rate: float = 5e-5
    warmup: float = 0.05
    clip: float = 1.0
    reconstruction: float = 0.01
    filter_codec: str = "int8"
    rounding: bool = True
    refit: bool = True
    sensitivity: bool = True
    seed: int = 0
    codecs: tuple[str, ...] | None = None

    @property
    def plan(self) -> Plan:
        """How the cache is stored."""
        return Plan(self.grid, self.latent, self.filter_layers, self.filter_codec, self.groups, self.codecs)

    def grids(self, layers: int) -> tuple[Grid, ...]:
        """The grid of every layer, filter layers among them."""
        sparse = self.plan.grids(layers)
        return tuple(sparse.get(layer, self.grid) for layer in range(layers))


def divergence(
    params: dict[str, Weights], model: LoadedModel, codec: str, grids: Sequence[Grid], tokens: Array, weights: Array
) -> tuple[Array, Array]:
    """Weighted KL of the next-token distributions of tokens [R, n] from those of dense attention, nats, where the
    history is compressed on the layers' `grids`, that of filter layers in `codec`; and the mean error of its layers."""
    rows, length = tokens.shape
    layers = tuple(params.get(str(layer)) for layer in range(model.config.num_layers))
    history = CompressedHistory(layers, jnp.zeros(rows, jnp.int32), tuple(grids), length, codec)
    batch = SimpleNamespace(tokens=tokens.reshape(-1), positions=jnp.tile(jnp.arange(length, dtype=jnp.int32), rows))
    decoder = Decoder(model.config, model.dtype)

    def read(kv: Any) -> tuple[Array, Any]:
        hidden, kv = decoder.apply({"params": model.params}, batch, kv)
        hidden = hidden.reshape(rows, length, -1)[:, :-1]
        return jax.nn.log_softmax(decoder.apply({"params": model.params}, hidden, method="logits")), kv

    dense, (found, history) = read(DenseCausal.of(model.config, length))[0], read(history)
    apart = (jnp.exp(dense) * (dense - found)).sum(-1)
    return (apart * weights[:, 1:]).sum() / weights[:, 1:].sum(), jnp.mean(jnp.stack(history.losses))


class Trainer:
    """Parameters of every sparse layer, the optimizer's state and the loop of both stages."""

    def __init__(
        self,
        model: LoadedModel,
        settings: Settings,
        out: str | Path,
        data: tuple[np.ndarray, np.ndarray, list[np.ndarray]],
        *,
        held_out: int = 4,
        metric: dict[str, Float[Array, "A W W"]] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        """`data` is what `train.collect.load_layers` gives; its last `held_out` sequences are for evaluation.

        `metric` is what `sensitivities` gives for the others; it is made where it is needed and not given. Batches are
        spread over the `devices`, all of them if they are not named.

        Raises:
            ConfigError: a batch cannot be spread evenly.
        """
        self.spread = Spread.over(devices or jax.devices(), rows=settings.rows, pages=settings.pages)
        self.model, self.settings, self.out = model, settings, Path(out).absolute()
        self.tokens, self.weights = data[0][:-held_out], data[1][:-held_out]
        rest = tuple(jnp.asarray(part[-held_out:]) for part in data[:2])
        widths = settings.plan.widths(model.config.num_layers)
        if metric is None and settings.sensitivity:
            metric = sensitivities(model, self.tokens, list(widths), settings.groups, settings.seed)
        made, self.grids = jax.jit(pairs_of, static_argnums=(1, 2)), settings.grids(model.config.num_layers)
        self.pairs, self.held = {}, {}
        for layer in widths:
            name = str(layer)
            one = metric[name] if settings.sensitivity else None
            found = made(data[2][layer], self.grids[layer], settings.groups, one)
            cut = len(found.tokens) * (len(data[0]) - held_out) // len(data[0])
            self.pairs[name], self.held[name] = found.part(slice(cut)), found.part(slice(cut, None))
        self.metric, inner = metric, settings.inner // settings.groups
        start = {
            str(layer): principal(self.pairs[str(layer)], width // settings.groups, inner, settings.seed)
            for layer, width in widths.items()
        }
        self.params, self.frozen = self.spread.everywhere((start, model.params))
        self.best, self.score = self.params, np.float32(np.inf)
        self.optimizers = _optimizers(settings)
        self.state = self.optimizers[0].init(self.params)
        self.step, self.total = 0, settings.layer_steps + settings.model_steps
        self.rest, codec, trained = rest, settings.filter_codec, self.grids
        if not settings.rounding:
            trained = tuple(dataclasses.replace(grid, latents="none") for grid in trained)

        # Data and frozen weights are arguments: constants of a program would be folded, for minutes.
        def layer_loss(params: dict[str, Weights], frozen: Any, batch: dict[str, Pairs]) -> Array:
            return mean_error(params, {name: one.stored_as(trained[int(name)].latents) for name, one in batch.items()})

        def model_loss(params: dict[str, Weights], frozen: Any, batch: tuple[Array, Array]) -> Array:
            apart, error = divergence(params, dataclasses.replace(model, params=frozen), codec, trained, *batch)
            return apart + settings.reconstruction * error

        def held_divergence(params: dict[str, Weights], frozen: Any, rest: tuple[Array, Array]) -> Array:
            whole = dataclasses.replace(model, params=frozen)

            def one(pair: tuple[Array, Array]) -> Array:
                return divergence(params, whole, codec, self.grids, *(part[None] for part in pair))[0]

            return jax.lax.map(one, rest).mean()

        self._mean_error = jax.jit(mean_error)
        self._divergence = jax.jit(held_divergence)
        losses = (layer_loss, model_loss)
        self._stages = [_advance(*pair) for pair in zip(losses, self.optimizers, strict=True)]
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.out / "checkpoints", options=options)
        if (latest := self.manager.latest_step()) is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._tree())
            saved = self.manager.restore(latest, args=ocp.args.StandardRestore(target))
            self.params, self.state, self.best, self.score = (saved[name] for name in self._tree())
            self.step = latest

    def _tree(self) -> dict[str, Any]:
        return {"params": self.params, "state": self.state, "best": self.best, "score": np.asarray(self.score)}

    def _batch(self) -> Any:
        """Pages of every layer, or whole sequences, by the step's own random numbers."""
        rng = np.random.default_rng((self.settings.seed, self.step))
        if self.step < self.settings.layer_steps:
            some = next(iter(self.pairs.values()))
            chosen = rng.integers(0, len(some.tokens), self.settings.pages)
            return {name: pairs.part(chosen).over(self.spread) for name, pairs in self.pairs.items()}
        chosen = rng.integers(0, len(self.tokens), self.settings.rows)
        return self.spread.split((self.tokens[chosen], self.weights[chosen]))

    def run(self, *, until: int | None = None, report_every: int = 10) -> None:
        """Trains to step `until`, or to the end, writing ``log.csv`` and checkpoints at every report.

        At the end of a stage the parameters are its best ones.
        """
        until = self.total if until is None else min(until, self.total)
        self.out.mkdir(parents=True, exist_ok=True)
        switch = self.settings.layer_steps
        if self.step == 0:
            self._report("start", None)
            if switch == 0:
                self._end_layers()
        losses: list[Array] = []
        while self.step < until:
            first = self.step < switch
            advance = self._stages[not first]
            self.params, self.state, loss = advance(self.params, self.state, self.frozen, self._batch())
            losses.append(loss)
            self.step += 1
            if self.step % report_every == 0 or self.step in (until, switch):
                self._report("layers" if first else "model", float(jnp.stack(losses).mean()))
                losses = []
                if self.step == switch:
                    self._end_layers()
                elif self.step == self.total:
                    self.params = self.best
                self.manager.save(self.step, args=ocp.args.StandardSave(self._tree()), force=True)
                self.manager.wait_until_finished()

    def evaluate(self) -> dict[str, float]:
        """What the parameters lose on the sequences held out: relative error, and divergence from dense in nats."""
        apart = self._divergence(self.params, self.frozen, self.rest)
        return {"error": self._error(self.params), "divergence": float(apart)}

    def _error(self, params: dict[str, Weights]) -> float:
        return float(self._mean_error(params, self.held))

    def _end_layers(self) -> None:
        """The best of stage ``layers``, with g refitted where that helps, is the start of stage ``model``."""
        self.params = self.best
        if self.settings.refit:
            self.params = {name: refitted(one, self.pairs[name]) for name, one in self.best.items()}
            if self._error(self.params) > self._error(self.best):
                self.params = self.best
        # The stages' gradients differ in size by orders: moments of the first would throw the second.
        self.state = self.optimizers[1].init(self.params)
        self.score = np.float32(np.inf)
        self._report("refit", None)

    def _report(self, stage: str, loss: float | None) -> None:
        """Logs a row and keeps the parameters where they are the best so far."""
        found = self.evaluate() if stage in ("refit", "model") else {"error": self._error(self.params)}
        error, apart = found["error"], found.get("divergence")
        score = error if apart is None else apart + self.settings.reconstruction * error
        if score < self.score:
            self.best, self.score = self.params, np.float32(score)
        path = self.out / "log.csv"
        with path.open("a", newline="") as file:
            rows = csv.writer(file)
            if file.tell() == 0:
                rows.writerow(COLUMNS)
            values = ("" if value is None else f"{value:.6f}" for value in (loss, error, apart))
            rows.writerow([self.step, stage, *values])
        print(*(self.step, stage, f"loss {loss} error {error:.5f} divergence {apart}"), flush=True)


def _advance(loss: Any, optimizer: optax.GradientTransformation) -> Any:
    """The jitted step ``(params, state, frozen, batch) -> (params, state, loss)`` of a stage."""

    def step(params: Any, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(params, frozen, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step)


def _optimizers(settings: Settings) -> tuple[optax.GradientTransformation, ...]:
    """AdamW behind clipping for each stage, with the stage's own rate and warm-up."""

    def stage(peak: float, steps: int) -> optax.GradientTransformation:
        warm = max(1, int(settings.warmup * steps))
        rate = optax.warmup_cosine_decay_schedule(peak / 10, peak, warm, max(steps, warm + 1), peak / 10)
        return optax.chain(optax.clip_by_global_norm(settings.clip), optax.adamw(rate, weight_decay=0.0))

    return stage(settings.rate, settings.layer_steps), stage(settings.model_rate, settings.model_steps)
