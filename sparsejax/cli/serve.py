"""Serve a model over HTTP to OpenAI's clients and everything that speaks like them.

sparsejax serve                                      # the model inside the package, on http://127.0.0.1:8000/v1
sparsejax serve path/or/hub-id --host 0.0.0.0 --api-key SECRET --max-model-len 32768

SIGTERM or Ctrl-C lets running requests finish for --shutdown-timeout seconds; a second one stops at once.
"""

from __future__ import annotations

import argparse

from sparsejax.cli import options
from sparsejax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sparsejax.serve.admission import ServiceLimits
    from sparsejax.serve.openai.options import HttpOptions

    parser.add_argument("served", nargs="?", metavar="MODEL", help="the same as --model")
    options.add_fields(parser, "HTTP server", HttpOptions)
    options.add_fields(parser, "limits", ServiceLimits)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    from sparsejax.serve.admission import ServiceLimits
    from sparsejax.serve.openai.options import HttpOptions

    if args.served is not None:
        args.model = args.served
    http = HttpOptions(**options.given(args, HttpOptions))
    limits = ServiceLimits(**options.given(args, ServiceLimits))
    config = options.make_config(args, warmup="full")
    try:
        from sparsejax.serve.openai.server import run as run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the server needs {error.name}: install it with pip install 'sparsejax[serve]'."
        ) from error
    from sparsejax.serve.service import Service

    run_server(Service(config, limits), http)
    return 0
