"""Serves a model over HTTP: `sparsejax serve` from a checkout. `python scripts/serve_openai.py --help` says more."""

from __future__ import annotations

import sys

from sparsejax.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
