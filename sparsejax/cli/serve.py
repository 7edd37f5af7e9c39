"""Serve a model over HTTP to OpenAI's clients and everything that speaks like them.

sparsejax serve                                      # the model inside the package, on http://127.0.0.1:8000/v1
sparsejax serve path/or/hub-id --host 0.0.0.0 --api-key SECRET --max-model-len 32768

SIGTERM or Ctrl-C lets running requests finish for --shutdown-timeout seconds; a second one stops at once.
"""

from __future__ import annotations

import argparse

from sparsejax.cli.servers import add_server_options, needs, read_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sparsejax.serve.openai.options import HttpOptions

    add_server_options(parser, "HTTP server", HttpOptions)


def run(args: argparse.Namespace) -> int:
    from sparsejax.serve.openai.options import HttpOptions

    settings, limits, config = read_server(args, HttpOptions)
    with needs("serve"):
        from sparsejax.serve.openai.server import run as run_server
        from sparsejax.serve.service import Service

    run_server(Service(config, limits), settings)
    return 0
