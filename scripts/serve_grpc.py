"""Serves a model over gRPC: `sparsejax grpc` from a checkout. `python scripts/serve_grpc.py --help` says more."""

from __future__ import annotations

import sys

from sparsejax.cli import main

if __name__ == "__main__":
    sys.exit(main(["grpc", *sys.argv[1:]]))
