"""DeltaKV compressors: a start by principal components, and training in two stages on a frozen model.

Stage ``layers`` fits each layer's reconstruction on collected keys and values: quick, since references do not depend on
the compressor. Stage ``model`` runs the whole frozen model over compressed history (the grid, open pages and
rounding of serving) for the next token, plus the reconstruction of every layer (after arXiv 2602.08005). Interrupted
runs go on where their last checkpoint was written.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float

from pallas_kernels.deltakv import (
    Grid,
    Weights,
    base_of,
    code_sequence,
    compress,
    expand,
    stored_latents,
    vectors,
)
from sparsejax.evaluation.plot import load_pyplot
from sparsejax.models.decoder import Decoder
from sparsejax.models.loader import LoadedModel
from train.history import CompressedHistory, relative_error

COLUMNS = ("step", "stage", "loss", "held_out")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a run; `rate` warms up over `warmup` of a stage's steps and falls to a tenth by a cosine."""

    grid: Grid = Grid()
    latent: int = 64
    inner: int = 128
    groups: int = 1
    filter_layers: tuple[int, ...] = (0,)
    layer_steps: int = 200
    model_steps: int = 0
    pages: int = 32
    rows: int = 1
    rate: float = 1e-3
    model_rate: float = 3e-4
    warmup: float = 0.05
    clip: float = 1.0
    reconstruction: float = 1.0
    filter_codec: str = "int8"
    rounding: bool = True
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One layer's tokens that are no centers and their bases, by page: [S, O, A, W] each."""

    tokens: Float[Array, "S O A W"]
    bases: Float[Array, "S O A W"]


jax.tree_util.register_dataclass(Pairs, ["tokens", "bases"], [])


def pairs_of(kept: np.ndarray, grid: Grid, groups: int) -> Pairs:
    """Pairs of a layer's collected [R, n, K, 2, D]."""
    heads, head_dim = kept.shape[2], kept.shape[4]
    whole = kept.shape[1] // grid.page_size * grid.page_size
    width = 2 * heads * head_dim // groups
    nothing = {name: jnp.zeros(shape) for name, shape in shapes(width, 1, 1, groups).items()}

    def one(row: Array) -> Pairs:
        x = vectors(row[:, :, 0], row[:, :, 1], groups)
        code, own = code_sequence(nothing, grid, x, head_dim)
        bases = base_of(own.reshape(-1, *own.shape[2:])[code.ordinals], code.index)
        tokens = x.reshape(-1, grid.own, grid.stride, groups, width)[:, :, 1:].reshape(bases.shape)
        return Pairs(tokens, bases)

    found = jax.lax.map(one, jnp.asarray(kept[:, :whole], jnp.float32))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)


def shapes(width: int, latent: int, inner: int, groups: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights; `width`, `latent` and `inner` are those of a head group."""
    return {
        "skip": (groups, latent, width),
        "gate_up": (groups, 2, inner, width),
        "down": (groups, latent, inner),
        "g": (groups, width, latent),
    }


def spread(pairs: Pairs, head_dim: int) -> Float[Array, "A W"]:
    """One over the root mean square of what is to be coded, keys and values apart."""
    difference = pairs.tokens - pairs.bases
    parts = difference.reshape(-1, difference.shape[-1] // (2 * head_dim), 2, head_dim)
    scale = jnp.sqrt(jnp.square(parts).mean((0, 1, 3)) + 1e-6)
    repeated = jnp.tile(jnp.repeat(1 / scale, head_dim), difference.shape[-1] // (2 * head_dim))
    return jnp.broadcast_to(repeated, difference.shape[-2:])


def principal(pairs: Pairs, latent: int, inner: int, head_dim: int, seed: int) -> Weights:
    """A start without training: f is linear, the principal components of x - b with keys and values on one scale."""
    groups, width = pairs.tokens.shape[2:]
    scale = spread(pairs, head_dim)
    scaled = ((pairs.tokens - pairs.bases) * scale).reshape(-1, groups, width)
    _, vectors_ = jnp.linalg.eigh(jnp.einsum("taw,tax->awx", scaled, scaled) / len(scaled))
    main = vectors_[..., ::-1][..., :latent]
    made = {name: jnp.zeros(shape) for name, shape in shapes(width, latent, inner, groups).items()}
    draw = jax.random.normal(jax.random.key(seed), made["gate_up"].shape)
    return made | {
        "skip": main.swapaxes(1, 2) * scale[:, None],
        "gate_up": draw * scale[:, None, None] * width**-0.5,
        "g": main / scale[..., None],
    }


def latents(weights: Weights, pairs: Pairs, grid: Grid) -> Float[Array, "S O A C"]:
    """z of pairs as stored."""
    return stored_latents(compress(weights, pairs.tokens) - compress(weights, pairs.bases), grid)


def pair_error(weights: Weights, pairs: Pairs, grid: Grid, head_dim: int) -> Array:
    """Relative error of tokens that are read back."""
    return relative_error(expand(weights, latents(weights, pairs, grid)) + pairs.bases, pairs.tokens, head_dim)


def mean_error(params: dict[str, Weights], pairs: dict[str, Pairs], grid: Grid, head_dim: int) -> Array:
    """Relative error over layers."""
    return jnp.mean(jnp.stack([pair_error(params[name], pairs[name], grid, head_dim) for name in params]))


def model_loss(
    params: dict[str, Weights], model: LoadedModel, settings: Settings, tokens: Array, weights: Array
) -> Array:
    """Weighted cross-entropy of tokens [R, n] read over compressed history, plus the mean error of its layers."""
    rows, length = tokens.shape
    layers = tuple(params.get(str(layer)) for layer in range(model.config.num_layers))
    raw_until = jnp.zeros(rows, jnp.int32)
    history = CompressedHistory(layers, raw_until, trained_grid(settings), length, settings.filter_codec)
    batch = SimpleNamespace(tokens=tokens.reshape(-1), positions=jnp.tile(jnp.arange(length, dtype=jnp.int32), rows))
    decoder = Decoder(model.config, model.dtype)
    hidden, history = decoder.apply({"params": model.params}, batch, history)
    hidden = hidden.reshape(rows, length, -1)[:, :-1]
    logits = decoder.apply({"params": model.params}, hidden, method="logits")
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    share = weights[:, 1:] / weights[:, 1:].sum()
    return (entropy * share).sum() + settings.reconstruction * jnp.mean(jnp.stack(history.losses))


def trained_grid(settings: Settings) -> Grid:
    """The grid of serving, its latents not rounded where training is to go without."""
    return settings.grid if settings.rounding else dataclasses.replace(settings.grid, latents="none")


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
    ) -> None:
        """`data` is what `train.collect.load_layers` gives; its last `held_out` sequences are for evaluation."""
        self.model, self.settings, self.out = model, settings, Path(out).absolute()
        self.head_dim = model.config.head_dim
        self.tokens, self.weights = data[0][:-held_out], data[1][:-held_out]
        names = [str(i) for i in range(model.config.num_layers) if i not in settings.filter_layers]
        made = jax.jit(pairs_of, static_argnums=(1, 2))
        self.pairs, self.held = {}, {}
        for name in names:
            found = made(data[2][int(name)], settings.grid, settings.groups)
            cut = len(found.tokens) * (len(data[0]) - held_out) // len(data[0])
            self.pairs[name] = jax.tree.map(lambda leaf, cut=cut: leaf[:cut], found)
            self.held[name] = jax.tree.map(lambda leaf, cut=cut: leaf[cut:], found)
        sizes = (settings.latent // settings.groups, settings.inner // settings.groups)
        self.params = {n: principal(self.pairs[n], *sizes, self.head_dim, settings.seed) for n in names}
        self.optimizers = _optimizers(settings)
        self.state = self.optimizers[0].init(self.params)
        self.step, self.total = 0, settings.layer_steps + settings.model_steps
        grid, error = trained_grid(settings), mean_error
        self._evaluate = jax.jit(lambda params: error(params, self.held, settings.grid, self.head_dim))
        losses = (
            lambda params, batch: error(params, batch, grid, self.head_dim),
            lambda params, batch: model_loss(params, model, settings, *batch),
        )
        self._stages = [_advance(*pair) for pair in zip(losses, self.optimizers, strict=True)]
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.out / "checkpoints", options=options)
        if (latest := self.manager.latest_step()) is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": self.params, "state": self.state})
            saved = self.manager.restore(latest, args=ocp.args.StandardRestore(target))
            self.params, self.state, self.step = saved["params"], saved["state"], latest

    def _batch(self) -> Any:
        """Pages of every layer, or whole sequences, by the step's own random numbers."""
        rng = np.random.default_rng((self.settings.seed, self.step))
        if self.step < self.settings.layer_steps:
            some = next(iter(self.pairs.values()))
            chosen = rng.integers(0, len(some.tokens), self.settings.pages)
            return jax.tree.map(lambda leaf: leaf[chosen], self.pairs)
        chosen = rng.integers(0, len(self.tokens), self.settings.rows)
        return jnp.asarray(self.tokens[chosen]), jnp.asarray(self.weights[chosen])

    def run(self, *, until: int | None = None, report_every: int = 20) -> None:
        """Trains to step `until`, or to the end, writing ``log.csv`` and checkpoints at every report."""
        until = min(until or self.total, self.total)
        self.out.mkdir(parents=True, exist_ok=True)
        if self.step == 0:
            self._log("start", float(self._evaluate(self.params)))
        losses: list[Array] = []
        while self.step < until:
            if self.step == self.settings.layer_steps:
                # The stages' gradients differ in size by orders: moments of the first would throw the second.
                self.state = self.optimizers[1].init(self.params)
            first = self.step < self.settings.layer_steps
            advance = self._stages[not first]
            self.params, self.state, loss = advance(self.params, self.state, self._batch())
            losses.append(loss)
            self.step += 1
            if self.step % report_every == 0 or self.step in (until, self.settings.layer_steps):
                self._log("layers" if first else "model", float(jnp.stack(losses).mean()))
                losses = []
                tree = {"params": self.params, "state": self.state}
                self.manager.save(self.step, args=ocp.args.StandardSave(tree), force=True)
                self.manager.wait_until_finished()

    def _log(self, stage: str, loss: float) -> None:
        path, held = self.out / "log.csv", float(self._evaluate(self.params))
        with path.open("a", newline="") as file:
            rows = csv.writer(file)
            if file.tell() == 0:
                rows.writerow(COLUMNS)
            rows.writerow([self.step, stage, round(loss, 5), round(held, 5)])
        print(f"step {self.step} {stage} loss {loss:.4f} held out {held:.4f}", flush=True)


def _advance(loss: Any, optimizer: optax.GradientTransformation) -> Any:
    """The jitted step ``(params, state, batch) -> (params, state, loss)`` of a stage."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Array]:
        value, gradients = jax.value_and_grad(loss)(params, batch)
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


def draw(log: str | Path, path: str | Path) -> None:
    """A picture of the losses in a run's ``log.csv``; needs matplotlib."""
    pyplot = load_pyplot()
    with Path(log).open() as file:
        rows = [row for row in csv.DictReader(file)]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    steps = [int(row["step"]) for row in rows]
    axes.plot(steps, [float(row["held_out"]) for row in rows], "o-", label="held-out relative error")
    axes.plot(steps, [float(row["loss"]) for row in rows], "x--", label="training loss of the stage")
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
