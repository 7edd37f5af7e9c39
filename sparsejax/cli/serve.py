"""Serve a model over HTTP to OpenAI's clients and everything that speaks like them.

sparsejax serve                                      # the model inside the package, on http://127.0.0.1:8000/v1
sparsejax serve path/or/hub-id --host 0.0.0.0 --api-key SECRET --max-model-len 32768
sparsejax serve --grpc-port 50051                    # over gRPC too, from the same engine

SIGTERM or Ctrl-C lets running requests finish for --shutdown-timeout seconds; a second one stops at once.
"""

from __future__ import annotations

import argparse

from sparsejax.cli.servers import add_server_options, needs, read_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sparsejax.serve.openai.options import HttpOptions

    add_server_options(parser, "HTTP server", HttpOptions)
    parser.add_argument(
        "--grpc-port",
        type=int,
        metavar="N",
        help="serve gRPC on this port too, from the same engine, with the same host, keys, names and certificate",
    )


def run(args: argparse.Namespace) -> int:
    from sparsejax.serve.grpc.options import GrpcOptions
    from sparsejax.serve.openai.options import HttpOptions

    settings, limits, config = read_server(args, HttpOptions)
    with needs("serve"):
        from sparsejax.serve.lifecycle import leave
        from sparsejax.serve.openai.server import run as run_server
        from sparsejax.serve.service import Service

    service = Service(config, limits)
    if args.grpc_port is None:
        run_server(service, settings)
        leave(service)
        return 0
    options = GrpcOptions(
        host=settings.host,
        port=args.grpc_port,
        api_key=settings.api_key,
        served_model_name=settings.served_model_name,
        tls_cert=settings.ssl_certfile,
        tls_key=settings.ssl_keyfile,
        insecure=True,  # as the HTTP server beside it
        shutdown_timeout=settings.shutdown_timeout,
    )
    with needs("serve"):
        from sparsejax.serve.grpc.server import serving
    run_server(service, settings, serving(service, options))
    leave(service)
    return 0
