"""A model twice its budget of weights against the same model held whole: time a step, streamed bytes, overlap."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import random_model, store
from benchmarks.report import markdown

M50 = random_model.Shape("m50", hidden=512, layers=16, heads=8, kv_heads=4, head_dim=64, ffn=1536, vocab=2000)
PROMPT, NEW = 192, 32
HEADER = (
    *("step", "whole, ms (min to max)", "streamed, ms (min to max)", "streamed / whole", "MB copied a step"),
    *("copies alone, ms", "of that not added to a step"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=7, help="after one that is not timed (default: 7)")
    parser.add_argument("--model-cache", type=Path, default=Path(".cache/bench"), help="where the random model is kept")
    parser.add_argument("--out", type=Path, help="write the results here")


def run(args: argparse.Namespace) -> int:
    from sparsejax import Engine
    from sparsejax.models.loader import load_model

    path = random_model.write(M50, "float32", args.model_cache)
    settings = dict(max_num_seqs=1, max_num_batched_tokens=PROMPT + 1, max_model_len=512, num_decode_steps=1)
    settings |= dict(enable_prefix_caching=False, warmup="lazy")
    whole = Engine.from_loaded(load_model(path), **settings)
    budget = whole.memory()["weights"] // 2
    streamed = Engine.from_loaded(load_model(path), weight_memory_bytes=budget, **settings)
    times = measure({"whole": whole, "streamed": streamed}, args.rounds)
    results = {
        **store.head(),
        "model": "m50 float32",
        "workload": {"prompt": PROMPT, "new": NEW, "rounds": args.rounds},
        "weights": whole.memory()["weights"],
        "budget": budget,
        "on_device": streamed.memory()["weights"],
        "streamed_bytes": streamed.core.runner.streamed_bytes,
        "counted_bytes_a_step": streamed.stats()["streamed_weight_bytes"] / streamed.stats()["steps"],
        "copy_seconds": copies(streamed, args.rounds),
        "steps": times,
    }
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def measure(engines: dict[str, Any], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step that reads a prompt, and of one that decodes, by engine; they take turns and answer alike.

    Float32: in bfloat16 the programs of the two engines round differently.
    """
    rng, times = random.Random(0), {kind: {name: [] for name in engines} for kind in ("prompt", "decode")}
    for number in range(rounds + 1):
        prompt = [rng.randrange(M50.vocab) for _ in range(PROMPT)]
        answers = set()
        for name in rng.sample(sorted(engines), len(engines)):
            seconds, tokens = ask(engines[name], prompt)
            answers.add(tokens)
            for kind, one in seconds.items():
                times[kind][name] += [one] if number else []
        if len(answers) != 1:
            raise SystemExit("the engines answer differently: this is a bug")
    return times


def ask(engine: Any, prompt: list[int]) -> tuple[dict[str, float], tuple[int, ...]]:
    """Seconds to the first token, and from token to token after it."""
    from sparsejax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    start, tokens, first = time.perf_counter(), [], 0.0
    for delta in engine.stream({"prompt_token_ids": prompt}, params):
        first = first or time.perf_counter()
        tokens += delta.outputs[0].token_ids
    return {"prompt": first - start, "decode": (time.perf_counter() - first) / (NEW - 1)}, tuple(tokens)


def copies(engine: Any, rounds: int) -> float:
    """Median seconds to copy every streamed layer to the device, one program that does nothing else."""
    import jax

    from sparsejax.models.streaming import STREAMED

    def copied(stacks: dict[str, Any]) -> list[dict[str, Any]]:
        layers = next(iter(stacks.values())).shape[0]
        return [jax.device_put({n: a[i] for n, a in stacks.items()}, jax.memory.Space.Device) for i in range(layers)]

    stacks, program, seconds = engine.core.runner.params[STREAMED], jax.jit(copied), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(program(stacks))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def table(stored: dict[str, Any]) -> str:
    """A row for each kind of step, in Markdown."""
    rows = []
    for kind, times in stored["steps"].items():
        whole, streamed = (statistics.median(times[name]) for name in ("whole", "streamed"))
        pairs = sorted(b / a for a, b in zip(times["whole"], times["streamed"], strict=True))
        hidden = 1 - (streamed - whole) / stored["copy_seconds"]
        rows.append(
            (
                {"prompt": f"a prompt of {stored['workload']['prompt']} tokens", "decode": "one token"}[kind],
                *(_spread(times[name]) for name in ("whole", "streamed")),
                f"{streamed / whole:.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})",
                f"{stored['streamed_bytes'] / 1e6:.1f}",
                f"{1e3 * stored['copy_seconds']:.1f}",
                f"{max(hidden, 0):.0%}",
            )
        )
    sizes = (f"{stored[name] / 1e6:.1f} MB" for name in ("weights", "budget", "on_device"))
    return "{} of weights, a budget of {}; {} stay on the device.\n\n".format(*sizes) + markdown([HEADER, *rows]) + "\n"


def _spread(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"
