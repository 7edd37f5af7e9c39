"""Full decode steps of a random model at long contexts: dense attention against ways to select and to store."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks import latents, random_model
from benchmarks.decode_report import decode_table
from benchmarks.process import Load
from benchmarks.serve import ROOT, progress
from benchmarks.store import SAME, head, save

ROWS = 4
KEEP = 2048
SHAPES = {shape.name: shape for shape in (random_model.M124, random_model.TINY)}
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "window": {"preset": "window"},
    "strided": {"preset": "strided"},
    "quest": {"preset": "quest"},
    "quest, blocks of 8": {"preset": "quest", "block": 8},
    "quest, blocks of 16": {"preset": "quest", "block": 16},
    "quest, 2 dense layers": {"preset": "quest", "dense_layers": 2},
    "omnikv": {"preset": "omnikv"},
    "turbo": {"preset": "turbo"},
    "int8": {"preset": "int8"},
    "int4": {"preset": "int4"},
    "quest, int4": {"preset": "quest", "codec": "int4"},
    "turbo, bf16 pages": {"preset": "turbo", "codec": "dense"},
    "turbo, no dense layers": {"preset": "turbo", "dense_layers": 0},
    "deltakv": {"preset": "deltakv"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 16384, 65536], metavar="TOKENS")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="NAME")
    parser.add_argument("--model", choices=SHAPES, default="m124")
    parser.add_argument("--dtype", default="bfloat16", choices=random_model.DTYPES)
    parser.add_argument("--keep", type=int, default=KEEP, metavar="TOKENS", help=f"budget (default: {KEEP})")
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps of a repetition (default: 8)")
    parser.add_argument("--reps", type=int, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/bench", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, after every context")


def run(args: argparse.Namespace) -> int:
    import jax
    import numpy as np

    import sparsejax

    shape = SHAPES[args.model]
    path = random_model.write(shape, args.dtype, args.cache)
    entry: dict[str, Any] = {
        "versions": {"sparsejax": sparsejax.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "policies": POLICIES,
    }
    results = {
        **head(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "model": dataclasses.asdict(shape),
        "workload": {
            "rows": ROWS, "keep": args.keep, "page_size": args.page_size, "steps": args.steps
        },
        "dtypes": {args.dtype: entry},
    }  # fmt: skip
    entry["runs"] = earlier_runs(args, results)
    for context in args.contexts:
        entry["runs"] += measure(path, context, args)
        save(args.out, results)
    print(decode_table(results, args.dtype))
    return 0


def earlier_runs(args: argparse.Namespace, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs of other contexts that the file has of the same workload on the same machine."""
    if args.out is None or not args.out.exists():
        return []
    earlier = json.loads(args.out.read_text())
    if any(earlier[name] != results[name] for name in SAME) or args.dtype not in earlier["dtypes"]:
        return []
    return [run for run in earlier["dtypes"][args.dtype]["runs"] if run["context"] not in args.contexts]


def measure(path: Path, context: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds per step of every policy. They take turns, the first round is not counted, and the order rotates."""
    model = long_model(path, args.dtype, context)
    steppers = {name: Stepper(model, policy(name, args.keep), context, args.page_size) for name in args.policies}
    pools = {stepper.codec: random_pools(stepper.group, context) for stepper in steppers.values()}
    for stepper in steppers.values():
        stepper.fill_bounds(pools[stepper.codec])
    runs, names = [], list(steppers)
    for repetition in range(-1, args.reps):
        for name in (*names[repetition % len(names) :], *names[: repetition % len(names)]):
            before = Load.now(os.getpid())
            cpu = time.process_time()
            stepper = steppers[name]
            pools[stepper.codec], seconds = stepper.run(pools[stepper.codec], args.steps)
            cpu = (time.process_time() - cpu) / args.steps
            foreign = Load.now(os.getpid()).since(before)["foreign_cpu"]
            if repetition >= 0:
                figures = {"seconds": seconds, "cpu_seconds": cpu, "read": stepper.read, "foreign_cpu": foreign}
                runs.append({"policy": name, "context": context, "repetition": repetition, **figures})
                progress(f"{context}: {repetition + 1}, {name}: {1e3 * seconds:.1f} ms, {1e3 * cpu:.1f} of processors")
    return runs


def policy(name: str, keep: int) -> Any:
    """The policy `name` with the budget under test."""
    from sparsejax.sparsity.policy import declared

    parameters = POLICIES[name]
    return declared({**parameters, "budget": keep} if parameters else "dense")[0]


def long_model(path: Path, dtype: str, context: int) -> Any:
    """The random model for sequences of `context` tokens."""
    from sparsejax.models.loader import load_model

    model = load_model(str(path), dtype)
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, max_position_embeddings=context)
    )


def random_pools(group: Any, tokens: int) -> tuple:
    """Normal keys and values, or random codes, in place of a prefill of `tokens`; layers of one layout hold the same
    ones."""
    import jax
    import jax.numpy as jnp

    from sparsejax.cache.layout import DenseLayout

    def draw(leaf: Any, seed: int) -> Any:
        key = jax.random.key(seed)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.random.normal(key, leaf.shape, leaf.dtype)
        return jax.random.bits(key, leaf.shape, f"uint{8 * leaf.dtype.itemsize}").astype(leaf.dtype)

    def fill(layout: Any) -> Any:
        shapes, tree = jax.tree.flatten(jax.eval_shape(layout.zeros))
        pools = jax.tree.unflatten(tree, [draw(shape, seed) for seed, shape in enumerate(shapes)])
        if isinstance(layout, DenseLayout) or not layout.latent:
            return pools
        return latents.within(pools[0], layout.sealed.grid, tokens), pools[1]

    filled = {layout: fill(layout) for layout in dict.fromkeys(group.layouts)}
    return tuple(jax.tree.map(jnp.copy, filled[layout]) for layout in group.layouts)


class Stepper:
    """The decode program of an engine that declares one policy, and its device state but for the pools."""

    def __init__(self, model: Any, policy: Any, context: int, page_size: int):
        import jax.numpy as jnp

        from sparsejax.cache.group import make_group
        from sparsejax.engine.rows import neutral_row
        from sparsejax.engine.runner import Runner
        from sparsejax.engine.sequence import Sequence
        from sparsejax.engine.table import StepTable
        from sparsejax.sparsity.rows import pack_policy
        from sparsejax.sparsity.selector import Selector

        pages, self.codec, compressor = context // page_size, policy.codec, None
        sizes = ROWS * pages + 1, ROWS
        if self.codec == "deltakv":
            compressor = latents.random_compressor(model.config, page_size)
            plan = latents.plan_of(compressor, model.config.num_layers)
            self.group, policy = plan.group(model.config, model.dtype, *sizes), policy.within(plan.filter_layers)
        else:
            shape = model.config, page_size, model.dtype, sizes[0]
            self.group = make_group(*shape, codec=self.codec, num_rows=ROWS)
        selector = Selector.of((policy,), page_size, model.config.num_kv_heads, context)
        table = StepTable.build(ROWS, 2 * ROWS, 1)
        self.runner = Runner(model, (self.group,), table, pages, None, selector, compressor=compressor)
        self.runner.warm([table.decode(ROWS, 1, greedy=True)])
        packed = None
        if selector is not None:
            packed = pack_policy(policy, context, page_size, selector.selects, model.config.num_layers)
        for row in range(ROWS):
            self.runner.admit(row, neutral_row(model.config.vocab_size), packed, None)
        tables = 1 + jnp.arange(ROWS * pages, dtype=jnp.int32).reshape(ROWS, pages)
        self.runner.state = self.runner.state.with_tables(jnp.pad(tables, ((0, 1), (0, 0))))
        self.sequences = [Sequence([1] * context, 1, (0, row, 0)) for row in range(ROWS)]
        for row, sequence in enumerate(self.sequences):
            sequence.row = row
        self.context, self.read = context, 1.0
        self._swap(())

    def _swap(self, pools: tuple) -> tuple:
        """Puts pools into the state and returns those that were there."""
        state = self.runner.state
        self.runner.state = dataclasses.replace(state, kv=dataclasses.replace(state.kv, pools=pools))
        return state.kv.pools

    def fill_bounds(self, pools: tuple) -> None:
        """Bounds of every page, where the policy reads any."""
        import jax
        import jax.numpy as jnp

        import pallas_kernels

        state = self.runner.state
        if state.kv.bounds[0] is None:
            return
        layout = self.group.layout
        every = jnp.arange(layout.num_pages, dtype=jnp.int32)

        def bounds_of(empty: Any, stored: tuple) -> Any:
            if self.codec == "dense":
                return pallas_kernels.page_bounds(empty, stored[0], every)
            return layout.sealed.bounds(empty, stored[0], every, jnp.int32(len(every)))

        make = jax.jit(bounds_of, donate_argnums=0)
        bounds = tuple(map(make, state.kv.bounds, pools))
        self.runner.state = dataclasses.replace(state, kv=dataclasses.replace(state.kv, bounds=bounds))

    def run(self, pools: tuple, steps: int) -> tuple[tuple, float]:
        """The mean time of the last `steps` steps of the context, each waited for, one row's token after another."""
        from sparsejax.engine.plan import StepPlan

        self._swap(pools)
        started = time.perf_counter()
        for length in range(self.context - steps + 1, self.context + 1):
            for sequence in self.sequences:
                sequence.num_computed = length
            plan = StepPlan(decode=self.sequences, outputs=[(s, length) for s in self.sequences])
            results = self.runner.read(self.runner.dispatch(plan, True, False))
        seconds = (time.perf_counter() - started) / steps
        if results.reads is not None:
            held, read = results.reads.tiles.sum((0, 1)).tolist()
            self.read = read / held
        return self._swap(()), seconds
