"""Serve a model over gRPC, with health, reflection and vLLM's engine service on the same port.

sparsejax grpc                                       # the model inside the package, on 127.0.0.1:50051
sparsejax grpc path/or/hub-id --host 0.0.0.0 --tls-cert server.pem --tls-key server.key --api-key SECRET

SIGTERM or Ctrl-C lets running requests finish for --shutdown-timeout seconds; a second one stops at once.
"""

from __future__ import annotations

import argparse

from sparsejax.cli import options
from sparsejax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sparsejax.serve.admission import ServiceLimits
    from sparsejax.serve.grpc.options import GrpcOptions

    parser.add_argument("served", nargs="?", metavar="MODEL", help="the same as --model")
    options.add_fields(parser, "gRPC server", GrpcOptions)
    options.add_fields(parser, "limits", ServiceLimits)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    from sparsejax.serve.admission import ServiceLimits
    from sparsejax.serve.grpc.options import GrpcOptions

    if args.served is not None:
        args.model = args.served
    settings = GrpcOptions(**options.given(args, GrpcOptions))
    limits = ServiceLimits(**options.given(args, ServiceLimits))
    config = options.make_config(args, warmup="full")
    try:
        from sparsejax.serve.grpc.server import run as run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the server needs {error.name}: install it with pip install 'sparsejax[serve]'."
        ) from error
    from sparsejax.serve.service import Service

    run_server(Service(config, limits), settings)
    return 0
