"""The ``sparsejax`` command. Nothing here imports JAX before a command runs, so help is instant."""

from __future__ import annotations

from sparsejax.cli.main import main

__all__ = ["main"]
