"""``python -m sparsejax`` is the ``sparsejax`` command."""

from __future__ import annotations

import sys

from sparsejax.cli import main

if __name__ == "__main__":
    sys.exit(main())
