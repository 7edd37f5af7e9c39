"""What the commands that serve a model share: flags of the server, of the limits and of the engine."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from sparsejax.cli import options
from sparsejax.errors import ConfigError


def add_server_options(parser: argparse.ArgumentParser, title: str, settings: type) -> None:
    """A model to serve, and a flag for every setting."""
    from sparsejax.serve.admission import ServiceLimits

    parser.add_argument("served", nargs="?", metavar="MODEL", help="the same as --model")
    options.add_fields(parser, title, settings)
    options.add_fields(parser, "limits", ServiceLimits)
    options.add_engine_options(parser)


def read_server(args: argparse.Namespace, settings: type) -> tuple[Any, Any, Any]:
    """The settings, the ServiceLimits and the EngineConfig that the flags describe.

    Raises:
        ConfigError: one of them cannot be used.
    """
    from sparsejax.serve.admission import ServiceLimits

    if args.served is not None:
        args.model = args.served
    limits = ServiceLimits(**options.given(args, ServiceLimits))
    return settings(**options.given(args, settings)), limits, options.make_config(args, warmup="full")


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of a server: what is missing is one clear error."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the server needs {error.name}: install it with pip install 'sparsejax[{extra}]'."
        ) from error
