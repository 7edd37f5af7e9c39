"""How tight key bounds are: attention probability that a selection captures, and what its bounds can prove of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import markdown
from benchmarks.store import head

TASKS = ("niah_single", "niah_multikey", "kv", "qa")
QUERIES = 16
SHARES = (0.5, 0.9, 0.99)


class Captured(NamedTuple):
    """Per query and KV head: probability of what is read, and the lower bound of it that page bounds give."""

    mass: np.ndarray
    proven: np.ndarray


class Recorder:
    """Dense causal attention that keeps the rotated queries and keys of every layer."""

    def __init__(self, scale: float):
        self.scale = scale
        self.layers: list[tuple[np.ndarray, np.ndarray]] = []

    def attend(self, layer: int, q: Any, k: Any, v: Any, batch: Any, rotate: Any) -> tuple[Any, Recorder]:
        import jax
        import jax.numpy as jnp

        q, k = rotate(q), rotate(k)
        self.layers.append((np.asarray(q, np.float64), np.asarray(k, np.float64)))
        groups = q.reshape(len(q), k.shape[1], -1, q.shape[2])
        scores = jnp.einsum("tkgd,skd->kgts", groups, k) * self.scale
        seen = jnp.arange(len(q)) <= jnp.arange(len(q))[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("kgts,skd->tkgd", weights, v).reshape(q.shape), self


def captured(q: np.ndarray, k: np.ndarray, scale: float, page_size: int, budget: int, pinned: int) -> Captured:
    """One query [H, D] at the end of keys [S, K, D]: the last `pinned` pages, the first one and the best by bound
    are read, `budget` pages in all. What is not read has at most `page_size` tokens at each page's bound."""
    pages = len(k) // page_size
    keys = k[: pages * page_size].reshape(pages, page_size, *k.shape[1:])
    groups = q.reshape(k.shape[1], -1, q.shape[1]) * scale
    exact = np.einsum("kgd,nskd->kgns", groups, keys)
    low, high = keys.min(1), keys.max(1)
    positive, negative = np.maximum(groups, 0), np.minimum(groups, 0)
    bound = np.einsum("kgd,nkd->kgn", positive, high) + np.einsum("kgd,nkd->kgn", negative, low)
    top = bound.max(axis=(1, 2), keepdims=True)
    given, most = np.exp(exact - top[..., None]).sum(-1), page_size * np.exp(bound - top)
    score = bound.max(1)
    score[:, :1] = score[:, pages - pinned :] = np.inf
    read = np.zeros_like(score, bool)
    np.put_along_axis(read, np.argsort(-score, axis=1, kind="stable")[:, :budget], True, axis=1)
    inside = (given * read[:, None]).sum(-1)
    return Captured(inside / given.sum(-1), inside / (inside + (most * ~read[:, None]).sum(-1)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=1024, help="tokens of a document (default: 1024)")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--share", type=float, default=0.25, help="share of the pages that is read (default: 0.25)")
    parser.add_argument("--samples", type=int, default=4, help="documents of each task (default: 4)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    layers = record(args.length, args.samples)
    figures = []
    for page_size in args.page_sizes:
        budget = int(args.share * args.length) // page_size
        for layer, recorded in enumerate(layers):
            found = [captured(*one, page_size, budget, 2) for one in recorded]
            mass, proven = (np.concatenate([np.ravel(part) for part in parts]) for parts in zip(*found, strict=True))
            figures.append({"page_size": page_size, "layer": layer, **summary(mass, proven)})
    results = {**head(), "length": args.length, "share": args.share, "samples": args.samples * len(TASKS)}
    results |= {"queries": QUERIES, "figures": figures}
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


def record(length: int, samples: int) -> list[list[tuple[np.ndarray, np.ndarray, float]]]:
    """Per layer of the model inside the package: the last queries of each document, their keys and the scale."""
    import jax.numpy as jnp

    from sparsejax.cache.paged import Rows, StepBatch
    from sparsejax.evaluation.tasks import make_sample
    from sparsejax.models.decoder import Decoder
    from sparsejax.models.loader import load_model
    from sparsejax.models.tokenizer import load_tokenizer

    model = load_model(None, "float32")
    tokenizer, scale = load_tokenizer(model.path), model.config.head_dim**-0.5
    layers: list[list] = [[] for _ in range(model.config.num_layers)]
    for task in TASKS:
        for seed in range(samples):
            one = make_sample(task, length=length, seed=seed, tokenizer=tokenizer)
            tokens = jnp.asarray(tokenizer(one.context + one.turns[0].prompt)["input_ids"], jnp.int32)
            nothing = jnp.zeros_like(tokens)
            batch = StepBatch(tokens, jnp.arange(len(tokens)), nothing, nothing, Rows(nothing[None], nothing[:1]))
            recorder = Recorder(scale)
            Decoder(model.config, model.dtype).apply({"params": model.params}, batch, recorder)
            for layer, (q, k) in enumerate(recorder.layers):
                layers[layer] += [(q[at], k[: at + 1], scale) for at in range(len(q) - QUERIES, len(q))]
    return layers


def summary(mass: np.ndarray, proven: np.ndarray) -> dict[str, Any]:
    return {
        "captured": [float(np.quantile(mass, at)) for at in (0.05, 0.5)],
        "proven": [float(np.quantile(proven, at)) for at in (0.5, 0.95)],
        "proven_share": {str(share): float((proven >= share).mean()) for share in SHARES},
        "captured_share": {str(share): float((mass >= share).mean()) for share in SHARES},
    }


def table(results: dict) -> str:
    """Markdown: one row per page size and layer."""
    rows = [("page size", "layer", "captured: 5%, median", "proven: median, 95%", *(f"at least {s}" for s in SHARES))]
    for entry in results["figures"]:
        shares = [
            f"{entry['captured_share'][str(share)]:.0%}, proven {entry['proven_share'][str(share)]:.0%}"
            for share in SHARES
        ]
        quantiles = [", ".join(f"{value:.3f}" for value in entry[name]) for name in ("captured", "proven")]
        rows.append((str(entry["page_size"]), str(entry["layer"]), *quantiles, *shares))
    return f"{markdown(rows)}\n"
