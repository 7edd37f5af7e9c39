"""Collect what a model's layers store: ``python -m train.collect --out runs/kv --data tasks --sequences 64``.

Sequences come from a text file, a JSONL file (its field ``text``) or the built-in tasks. Each shard is one file;
shards that are there already are kept, so an interrupted run goes on. The manifest says what was read and from which
model, with the mean square of each layer's keys and values.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.cache.codecs.compressor import fingerprint
from sparsejax.errors import ConfigError
from sparsejax.evaluation.suite import CASES, make_cell
from sparsejax.models.decoder import Decoder
from sparsejax.models.dense import DenseCausal
from sparsejax.models.loader import LoadedModel, load_model
from sparsejax.models.tokenizer import load_tokenizer
from train.history import Recorder

MANIFEST = "manifest.json"
REPLY, REST = 1.0, 0.02  # weights of predicting a reply's tokens and all others of a task


@dataclasses.dataclass(frozen=True)
class Source:
    """Where sequences come from: a path, or ``tasks`` with the names of evaluation cases."""

    path: str = "tasks"
    cases: tuple[str, ...] = ("niah_multikey_dense", "kv_dense", "niah_single", "vt_2_hops")
    seed: int = 1_000_000


def sequences(source: Source, tokenizer: Any, length: int) -> Iterator[tuple[list[int], list[float]]]:
    """Tokens of whole sequences and the weight of predicting each; ends with the file, tasks never end.

    Raises:
        ConfigError: there is no such file or case.
    """
    if source.path != "tasks":
        yield from _texts(Path(source.path), tokenizer, length)
        return
    if unknown := sorted(set(source.cases) - set(CASES)):
        raise ConfigError(f"cases {unknown} are unknown; known are {', '.join(CASES)}")
    number = 0
    while True:
        case = source.cases[number % len(source.cases)]
        request = make_cell(case, length - 16, 1, source.seed + number, tokenizer).requests[0]
        reply = tokenizer(request.turn.reply, add_special_tokens=False).input_ids
        tokens = [*request.token_ids, *reply]
        weights = [REST] * len(request.token_ids) + [REPLY] * len(reply)
        spare = length - len(tokens)
        yield (tokens + tokens[1 : spare + 1])[:length], (weights + [0.0] * max(0, spare))[:length]
        number += 1


def _texts(path: Path, tokenizer: Any, length: int) -> Iterator[tuple[list[int], list[float]]]:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}: give a text file, a .jsonl file or 'tasks'")
    left: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            left += tokenizer(json.loads(line)["text"] if path.suffix == ".jsonl" else line).input_ids
            while len(left) >= length:
                yield left[:length], [1.0] * length
                left = left[length:]


def collect(
    model: LoadedModel, tokenizer: Any, out: str | Path, source: Source, *, count: int, length: int, shard: int = 8
) -> dict[str, Any]:
    """Writes `count` sequences in shards of `shard`, and the manifest; returns the manifest.

    Raises:
        ConfigError: `out` holds another collection, or the source has fewer sequences.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "base_model": fingerprint(model.params),
        "source": json.loads(json.dumps(dataclasses.asdict(source))),
        "length": length,
        "count": count,
        "shard": shard,
    }
    path = out / MANIFEST
    if path.exists():
        there = json.loads(path.read_text())
        if differing := [name for name, value in facts.items() if there.get(name) != value]:
            raise ConfigError(f"{out} holds a collection with other {', '.join(differing)}: give an empty folder")
    else:
        path.write_text(json.dumps(facts, indent=2) + "\n")
    decoder = Decoder(model.config, model.dtype)

    @jax.jit
    def record(params: Any, tokens: jax.Array) -> tuple[jax.Array, ...]:
        positions = jnp.arange(length, dtype=jnp.int32)
        kv = Recorder(DenseCausal.of(model.config))
        return decoder.apply({"params": params}, SimpleNamespace(tokens=tokens, positions=positions), kv)[1].kept

    found, squares, done = sequences(source, tokenizer, length), [], 0
    for number in range(-(-count // shard)):
        rows = min(shard, count - done)
        taken = list(islice(found, rows))
        if len(taken) < rows:
            raise ConfigError(f"{source.path} has {done + len(taken)} sequences of {length} tokens; {count} were asked")
        file = out / f"shard-{number:05d}.npz"
        if not file.exists():
            tokens = np.asarray([one for one, _ in taken], np.int32)
            kept = [jax.device_get(record(model.params, row)) for row in tokens]
            layers = {f"layer_{i}": np.stack([row[i] for row in kept]) for i in range(model.config.num_layers)}
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, tokens=tokens, weights=np.asarray([w for _, w in taken], np.float32), **layers)
            partial.rename(file)
        with np.load(file) as there:
            squares.append([np.square(there[f"layer_{i}"]).mean((0, 1, 2, 4)) for i in range(model.config.num_layers)])
        done += rows
    facts["mean_squares"] = np.mean(squares, axis=0).tolist()
    path.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def load_layers(path: str | Path) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Tokens [R, n], weights [R, n] and each layer's [R, n, K, 2, D] of a collection."""
    files = sorted(Path(path).glob("shard-[0-9]*.npz"))
    if not files:
        raise ConfigError(f"{path} holds no collection: run python -m train.collect")
    loaded = [dict(np.load(file)) for file in files]
    layers = sum(name.startswith("layer_") for name in loaded[0])
    names = ("tokens", "weights", *(f"layer_{i}" for i in range(layers)))
    tokens, weights, *kept = (np.concatenate([one[name] for one in loaded]) for name in names)
    return tokens, weights, kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which model reads which sequences."""
    parser.add_argument("--model", help="checkpoint; the one in the package if not given")
    parser.add_argument("--data", default="tasks", help="text file, .jsonl file, or 'tasks'")
    parser.add_argument("--tasks", nargs="+", default=Source.cases, metavar="CASE", help="named twice counts twice")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)


def collect_from(args: argparse.Namespace, out: str | Path) -> tuple[LoadedModel, Any, dict[str, Any]]:
    """Collects what the arguments say; returns the model, its tokenizer and the manifest."""
    model = load_model(args.model)
    tokenizer, source = load_tokenizer(model.path), Source(args.data, tuple(args.tasks))
    return model, tokenizer, collect(model, tokenizer, out, source, count=args.sequences, length=args.length)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    _, _, facts = collect_from(args, args.out)
    print(f"{facts['count']} sequences of {facts['length']} tokens in {args.out}")


if __name__ == "__main__":
    main()
