"""Train the embedded model: ``python -m train.pretrain --recipe train/recipes/embedded.json --out runs/embedded``.

The same command runs on CPU, on one GPU and data-parallel on all visible devices. An interrupted run goes on where its
last checkpoint was written, with the same results as without the interruption.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from sparsejax.errors import ConfigError
from train import model
from train.facts import KINDS
from train.feed import Feed
from train.lexicon import Lexicon
from train.optimizer import build_optimizer
from train.planting import plant
from train.recipe import Recipe, load_recipe
from train.step import build_step, place

COLUMNS = ("step", "tokens", "seconds", "length", "loss", "tokens_per_second", *KINDS)


def model_shape(recipe: Recipe, lexicon: Lexicon) -> model.Shape:
    """The recipe's shape with the vocabulary padded to a multiple of 64."""
    return model.Shape(vocab_size=-(-lexicon.vocab_size // 64) * 64, **recipe.shape)


class Trainer:
    """Parameters, optimizer state and the loop around the jitted step."""

    def __init__(self, recipe: Recipe, out: str | Path, *, keep: int = 3) -> None:
        self.recipe, self.out = recipe, Path(out).absolute()
        self.lexicon = Lexicon()
        self.shape = model_shape(recipe, self.lexicon)
        self.mesh = Mesh(np.asarray(jax.devices()), ("data",))
        for stage in recipe.stages:
            if stage.micro_rows % len(jax.devices()):
                raise ConfigError(
                    f"micro_rows {stage.micro_rows} cannot be spread over {len(jax.devices())} devices: use a multiple "
                    "of their number in every stage of the recipe"
                )
        self.optimizer = build_optimizer(recipe)
        self.advance = build_step(self.shape, self.optimizer)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.out / "checkpoints", options=options)
        everywhere = NamedSharding(self.mesh, Spec())
        start = model.initialize(self.shape, recipe.seed)
        start = plant(self.shape, start, recipe.seed) if recipe.planted else start
        self.params = jax.device_put(start, everywhere)
        self.state = jax.jit(self.optimizer.init)(self.params)
        self.step, self.tokens = 0, 0
        if (latest := self.manager.latest_step()) is not None:
            self._restore(latest)

    def _restore(self, step: int) -> None:
        target = {"params": self.params, "state": self.state, "tokens": 0}
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        saved = self.manager.restore(step, args=ocp.args.StandardRestore(target))
        self.params, self.state, self.step, self.tokens = saved["params"], saved["state"], step, int(saved["tokens"])
        print(f"resumed at step {step}, {self.tokens:,} tokens", flush=True)

    def save(self) -> None:
        tree = {"params": self.params, "state": self.state, "tokens": self.tokens}
        self.manager.save(self.step, args=ocp.args.StandardSave(tree), force=True)
        self.manager.wait_until_finished()

    def run(
        self, *, until: int | None = None, report_every: int = 20, save_every: int = 200, workers: int = 0
    ) -> None:
        """Train up to step `until` (or the recipe's end), printing and logging as it goes.

        `workers` processes make batches ahead; with 0 the next batch is made while the device computes.
        """
        until = min(until or self.recipe.total_steps, self.recipe.total_steps)
        with Feed(self.recipe, self.step, until, workers) as feed:
            self._run(feed, report_every, save_every)

    def _run(self, feed: Feed, report_every: int, save_every: int) -> None:
        log = _Log(self.out / "log.csv")
        losses, counts, seen, since = [], [], 0, time.perf_counter()
        batch = feed.take()
        while batch is not None:
            stage = self.recipe.stage_at(self.step)
            placed = place(batch, stage.micro_rows, self.mesh)
            self.params, self.state, loss, count = self.advance(self.params, self.state, placed)
            self.step += 1
            self.tokens += stage.rows * stage.length
            seen += stage.rows * stage.length
            batch = feed.take()
            losses.append(loss)
            counts.append(count)
            turn = batch is None or self.recipe.stage_at(self.step) is not stage
            if self.step % report_every == 0 or turn:
                right, total = np.sum(jax.device_get(counts), axis=0)
                now = time.perf_counter()
                log.write(self.step, self.tokens, now - since, stage.length, float(np.mean(losses)), seen, right, total)
                losses, counts, seen, since = [], [], 0, now
            if turn or self.step % save_every == 0:
                self.save()
                since += time.perf_counter() - (now if seen == 0 else time.perf_counter())


class _Log:
    """Progress on the terminal and in a CSV file."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            rows = list(csv.DictReader(path.open()))
            self.seconds = float(rows[-1]["seconds"]) if rows else 0.0
        else:
            path.write_text(",".join(COLUMNS) + "\n")

    def write(
        self,
        step: int,
        tokens: int,
        took: float,
        length: int,
        loss: float,
        seen: int,
        right: np.ndarray,
        total: np.ndarray,
    ) -> None:
        self.seconds += took
        scores = [round(float(r / t), 4) if t else "" for r, t in zip(right, total, strict=True)]
        row = [step, tokens, round(self.seconds, 1), length, round(loss, 4), round(seen / took), *scores]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(row)
        named = " ".join(f"{kind} {score}" for kind, score in zip(KINDS, scores, strict=True) if score != "")
        rate = f"{seen / took:,.0f} tokens/s"
        print(f"step {step} tokens {tokens:,} length {length} loss {loss:.3f} {rate} {named}", flush=True)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="JSON recipe file")
    parser.add_argument("--out", required=True, help="folder for checkpoints and log.csv; an existing run goes on")
    parser.add_argument("--seed", type=int, help="of weights and documents, instead of the recipe's")
    parser.add_argument("--until", type=int, help="stop after this step")
    parser.add_argument("--data-workers", type=int, default=0, help="processes that make batches ahead (for a GPU: 4)")
    parser.add_argument("--report-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    trainer = Trainer(recipe if args.seed is None else replace(recipe, seed=args.seed), args.out)
    count = sum(x.size for x in jax.tree.leaves(trainer.params))
    print(f"{count:,} parameters on {len(jax.devices())} {jax.default_backend()} device(s)", flush=True)
    trainer.run(
        until=args.until, report_every=args.report_every, save_every=args.save_every, workers=args.data_workers
    )


if __name__ == "__main__":
    main()
