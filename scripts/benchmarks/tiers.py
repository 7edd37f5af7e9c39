"""Documents that together need four times the KV pool, asked again and again: recomputed, from main memory, from disk.

Every mode is an engine of its own over the same random model and pool; they take turns, a round each. In a round each
document is asked one new question, in a new order, one after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import random_model, store

M21 = random_model.Shape("m21", hidden=512, layers=4, heads=8, kv_heads=4, head_dim=64, ffn=1536, vocab=8000)
TIMES = 4
"""Bytes of all documents over those of the pool."""
QUESTION = 16
COUNTERS = (
    *("prefix_cache_hits", "computed_tokens", "host_kv_hits", "disk_kv_hits"),
    *("kv_pages_saved", "kv_pages_loaded", "kv_pages_passed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--tokens", type=int, default=512, help="of a document (default: 512)")
    parser.add_argument("--rounds", type=int, default=5, help="after the one that computes all (default: 5)")
    parser.add_argument("--model-cache", type=Path, default=Path(".cache/bench"), help="where the random model is kept")
    parser.add_argument("--out", type=Path, help="write the results here")


def run(args: argparse.Namespace) -> int:
    path = random_model.write(M21, "bfloat16", args.model_cache)
    rng = random.Random(0)
    vocab = M21.vocab
    documents = [[rng.randrange(vocab) for _ in range(args.tokens)] for _ in range(args.documents)]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        engines = make_engines(path, args, Path(one), Path(other))
        results = measure(engines, documents, args.rounds, rng)
    for name, found in results.items():
        print(f"{name:24} {found['seconds']:.2f} s a round, {found['prompt_tokens_per_second']:.0f} prompt tokens/s")
    if args.out:
        workload = {"documents": args.documents, "tokens": args.tokens, "rounds": args.rounds, "times": TIMES}
        written = {**store.head(), "model": "m21 bfloat16", "workload": workload, "modes": results}
        args.out.write_text(json.dumps(written, indent=1) + "\n")
    return 0


def make_engines(path: Path, args: argparse.Namespace, one: Path, other: Path) -> dict[str, Any]:
    """An engine for each mode. The second with a disk has main memory for a quarter of the documents."""
    from sparsejax import Engine
    from sparsejax.models.loader import load_model

    model = load_model(path)
    length = args.tokens + 4 * QUESTION
    settings = dict(max_num_seqs=2, max_num_batched_tokens=256, max_model_len=length, num_decode_steps=1)
    with Engine.from_loaded(model, **settings, kv_memory_bytes=1 << 27, warmup="none") as engine:
        page = engine.stats()["kv_page_bytes"]
    everything = args.documents * (length // 32 + 1) * page
    settings["kv_memory_bytes"] = everything // TIMES
    disk = dict(disk_kv_bytes=2 * everything)
    return {
        "recomputed": Engine.from_loaded(model, **settings),
        "main memory": Engine.from_loaded(model, **settings, host_kv_bytes=2 * everything),
        "main memory and disk": Engine.from_loaded(
            model, **settings, **disk, host_kv_bytes=everything // 4, disk_kv_path=str(one)
        ),
        "disk": Engine.from_loaded(model, **settings, **disk, disk_kv_path=str(other)),
    }


def measure(engines: dict[str, Any], documents: list[list[int]], rounds: int, rng: random.Random) -> dict[str, Any]:
    """Medians over the rounds by mode; every mode must answer alike."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    busy: dict[str, list[float]] = {name: [] for name in engines}
    before: dict[str, dict] = {}
    for number in range(rounds + 1):
        order = rng.sample(documents, len(documents))
        prompts = [document + [rng.randrange(2, 1000) for _ in range(QUESTION)] for document in order]
        answers = set()
        for name, engine in rng.sample(sorted(engines.items()), len(engines)):
            start, cpu = time.perf_counter(), time.process_time()
            answers.add(ask(engine, prompts))
            if number:
                seconds[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - cpu)
            else:
                before[name] = engine.stats()
        if len(answers) != 1:
            raise SystemExit("the modes answer differently: this is a bug")
    tokens = sum(map(len, prompts))
    found = {}
    for name, engine in engines.items():
        stats, median = engine.stats(), statistics.median(seconds[name])
        found[name] = {
            "seconds": median,
            "all_seconds": seconds[name],
            "cpu_seconds": statistics.median(busy[name]),
            "prompt_tokens_per_second": tokens / median,
            "prompt_tokens": tokens * rounds,
            **{counter: stats.get(counter, 0) - before[name].get(counter, 0) for counter in COUNTERS},
            **{key: stats[key] for key in sorted(stats) if key.startswith("kv_page_")},
            "memory": engine.memory(),
        }
        engine.shutdown()
    return found


def ask(engine: Any, prompts: list[list[int]]) -> tuple:
    """The answers, one request after the other."""
    from sparsejax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
    outputs = (engine.generate({"prompt_token_ids": prompt}, params)[0] for prompt in prompts)
    return tuple(tuple(output.outputs[0].token_ids) for output in outputs)


def table(stored: dict[str, Any]) -> str:
    """A row per mode, in Markdown."""
    heads = (
        *("pages come from", "seconds a round (min to max)", "CPU seconds", "prompt tokens/s", "against recomputing"),
        *("tokens not computed", "pages read from memory, disk", "MB in memory, disk"),
        "ms a page: read (memory, disk), load, compute",
    )
    rows = [heads, ("---",) * len(heads)]
    base = stored["modes"]["recomputed"]["seconds"]
    for name, mode in stored["modes"].items():
        costs = (mode.get(f"kv_page_{what}_seconds") for what in ("host", "disk", "load", "compute"))
        host, disk, load, compute = ("-" if cost is None else f"{1e3 * cost:.2f}" for cost in costs)
        spread = f"{min(mode['all_seconds']):.2f} to {max(mode['all_seconds']):.2f}"
        rows.append(
            (
                *(name, f"{mode['seconds']:.2f} ({spread})", f"{mode['cpu_seconds']:.2f}"),
                *(f"{mode['prompt_tokens_per_second']:.0f}", f"{base / mode['seconds']:.2f} x"),
                f"{mode['prefix_cache_hits'] / mode['prompt_tokens']:.0%}",
                f"{mode['host_kv_hits']}, {mode['disk_kv_hits']}",
                ", ".join(f"{mode['memory'].get(part, 0) / 1e6:.1f}" for part in ("host_kv_pages", "disk_kv_pages")),
                f"{host}, {disk}, {load}, {compute}",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
