"""Accuracy of a checkpoint on the built-in tasks, served by the engine: ``python -m train.scorecard --model DIR``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from sparsejax import Engine, SamplingParams
from sparsejax.evaluation.tasks import make_sample

DENSE = {"filler": "needle", "density": 1.0}
HALF = {"filler": "needle", "density": 0.5}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "NIAH single, filler": ("niah_single", {}),
    "NIAH single, noise": ("niah_single", {"filler": "noise"}),
    "NIAH multi-key, filler": ("niah_multikey", {}),
    "NIAH multi-key, half needles": ("niah_multikey", HALF),
    "NIAH multi-key, all needles": ("niah_multikey", DENSE),
    "key-value, filler": ("kv", {"filler": "markov"}),
    "key-value, half pairs": ("kv", HALF),
    "key-value, all pairs": ("kv", DENSE),
    "NIAH multi-query, filler": ("niah_multiquery", {}),
    "NIAH multi-query, all needles": ("niah_multiquery", DENSE),
    "NIAH multi-value, filler": ("niah_multivalue", {}),
    "NIAH multi-value, all needles": ("niah_multivalue", DENSE),
    "variable tracking, 1 chain, 2 hops": ("vt", {"hops": 2}),
    "variable tracking, 1 chain, 4 hops": ("vt", {"hops": 4}),
    "variable tracking, 3 chains, 3 hops": ("vt_multichain", {}),
    "question answering": ("qa", {}),
    "question answering, 2 hops": ("qa_two_hops", {}),
    "common words": ("cwe", {}),
    "frequent words": ("fwe", {}),
}


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    if count == 0:
        return 0.0, 1.0
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def score(engine: Engine, cell: str, length: int, samples: int, seed: int = 10_000) -> dict[str, Any]:
    """Exact answers of greedy decoding over `samples` documents of a cell."""
    task, options = CELLS[cell]
    seeds = range(seed, seed + samples)
    made = [make_sample(task, length=length, seed=one, tokenizer=engine.tokenizer, **options) for one in seeds]
    prompts = [sample.segments("Q+")[0] for sample in made]
    replies = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
    texts = [reply.outputs[0].text for reply in replies]
    right = sum(sample.turns[0].score(text) for sample, text in zip(made, texts, strict=True))
    low, high = wilson(right, samples)
    wrong = [
        [sample.turns[0].reply, text]
        for sample, text in zip(made, texts, strict=True)
        if not sample.turns[0].score(text)
    ]
    return {
        "cell": cell,
        "length": length,
        "samples": samples,
        "right": right,
        "low": round(low, 4),
        "high": round(high, 4),
        "wrong": wrong[:3],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, one line per cell and one column per length."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| task | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for cell in dict.fromkeys(row["cell"] for row in rows):
        found = {row["length"]: row for row in rows if row["cell"] == cell}
        shown = [_show(found[length]) if length in found else "-" for length in lengths]
        lines.append(f"| {cell} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _show(row: dict[str, Any]) -> str:
    return f"{100 * row['right'] / row['samples']:.1f} [{100 * row['low']:.0f}-{100 * row['high']:.0f}]"


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint folder; the shipped one if absent")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--only", help="cells whose name contains this")
    parser.add_argument("--out", help="write the results to this JSON file")
    args = parser.parse_args()
    rows = []
    with Engine(args.model, max_model_len=max(args.lengths) + 64, max_num_seqs=8) as engine:
        for cell in CELLS:
            for length in args.lengths if not args.only or args.only in cell else ():
                rows.append(score(engine, cell, length, args.samples))
                print(f"{cell}, {length} tokens: {_show(rows[-1])}", flush=True)
                for expected, got in rows[-1]["wrong"]:
                    print(f"    expected {expected!r} got {got!r}", flush=True)
    print(table(rows))
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
