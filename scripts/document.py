"""Prints a document of the evaluation with its question and answer: `python scripts/document.py kv_dense 1024 0`."""

from __future__ import annotations

import argparse

from sparsejax.evaluation.suite import CASES
from sparsejax.evaluation.tasks import make_sample
from sparsejax.models.loader import load_model
from sparsejax.models.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("tokens", type=int, help="of the embedded model's tokenizer")
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    task, options, protocol = CASES[args.case]
    tokenizer = load_tokenizer(load_model(None).path)
    sample = make_sample(task, length=args.tokens, seed=args.seed, tokenizer=tokenizer, **options)
    *_, last = sample.asks(protocol)
    print(last.text + last.turn.reply)


if __name__ == "__main__":
    main()
