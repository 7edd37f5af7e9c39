"""What scoring blocks of pages first loses: attention probability of lists in two levels against lists in one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bounds
from benchmarks.report import markdown
from benchmarks.store import head


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, default=4096, help="tokens of a document (default: 4096)")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.0625, help="share of the pages that is read (default: 1/16)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16], metavar="PAGES")
    parser.add_argument("--candidates", type=int, nargs="+", default=[2, 4], metavar="N")
    parser.add_argument("--samples", type=int, default=1, help="documents of each task (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    layers = bounds.record(args.length, args.samples)
    budget = int(args.share * args.length) // args.page_size
    ways = [(0, 0), *((block, count) for block in args.blocks for count in args.candidates)]
    figures = []
    for layer, recorded in enumerate(layers):
        scored = [scores(q, k, scale, args.page_size) for q, k, scale in recorded]
        for block, candidates in ways:
            found = [captured(*one, budget, block, candidates) for one in scored]
            mass, same = (np.concatenate(parts) for parts in zip(*found, strict=True))
            figure = {"captured": float(mass.mean()), "same": float(same.mean())}
            figures.append({"layer": layer, "block": block, "candidates": candidates, **figure})
    results = {**head(), "length": args.length, "page_size": args.page_size, "share": args.share}
    results |= {"samples": args.samples * len(bounds.TASKS), "queries": bounds.QUERIES, "figures": figures}
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


def scores(q: np.ndarray, k: np.ndarray, scale: float, page_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one query [H, D] at the end of keys [S, K, D]: probability [K, G, n] of pages, queries and key bounds."""
    pages = len(k) // page_size
    keys = k[: pages * page_size].reshape(pages, page_size, *k.shape[1:])
    groups = q.reshape(k.shape[1], -1, q.shape[1]) * scale
    exact = np.einsum("kgd,nskd->kgns", groups, keys)
    given = np.exp(exact - exact.max(axis=(2, 3), keepdims=True)).sum(-1)
    return given / given.sum(-1, keepdims=True), groups, np.stack([keys.min(1), keys.max(1)])


def upper(groups: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """The largest bound of a KV head's queries [K, n] with pages, or blocks of them, between `limits` [2, n, K, D]."""
    negative = np.einsum("kgd,nkd->kgn", np.minimum(groups, 0), limits[0])
    return (negative + np.einsum("kgd,nkd->kgn", np.maximum(groups, 0), limits[1])).max(1)


def captured(
    mass: np.ndarray, groups: np.ndarray, limits: np.ndarray, budget: int, block: int, candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of what is read, per KV head, and the share of its pages that scoring every page reads too.

    The first page and the last two are pinned, as are the blocks that hold them; of the other blocks as many are
    opened as hold `candidates` times the other pages. Block 0 scores every page.
    """
    every = upper(groups, limits)
    pages = every.shape[1]
    every[:, :1] = every[:, pages - 2 :] = np.inf
    wanted = best(every, budget)
    if not block:
        return (mass * wanted[:, None]).sum(-1).mean(1), np.ones(len(every))
    starts = np.arange(0, pages, block)
    coarse = upper(groups, np.stack([np.minimum.reduceat(limits[0], starts), np.maximum.reduceat(limits[1], starts)]))
    coarse[:, :1] = coarse[:, (pages - 2) // block :] = np.inf
    pinned = 1 + len(starts) - (pages - 2) // block
    opened = best(coarse, pinned - (-candidates * (budget - 3) // block))
    read = best(np.where(np.repeat(opened, block, axis=1)[:, :pages], every, -np.inf), budget)
    return (mass * read[:, None]).sum(-1).mean(1), (read & wanted).sum(1) / budget


def best(scored: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest of each row, as a mask."""
    chosen = np.zeros(scored.shape, bool)
    np.put_along_axis(chosen, np.argsort(-scored, axis=1, kind="stable")[:, :count], True, axis=1)
    return chosen


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per way to score, a column per layer."""
    layers = sorted({entry["layer"] for entry in results["figures"]})
    ways = dict.fromkeys((entry["block"], entry["candidates"]) for entry in results["figures"])
    rows = [("pages of a block, candidates", *(f"layer {layer}" for layer in layers), "same pages")]
    for way in ways:
        mine = [entry for entry in results["figures"] if (entry["block"], entry["candidates"]) == way]
        name = f"{way[0]}, {way[1]} x" if way[0] else "every page is scored"
        same = f"{np.mean([entry['same'] for entry in mine]):.0%}"
        rows.append((name, *(f"{entry['captured']:.3f}" for entry in mine), same))
    return f"{markdown(rows)}\n"
