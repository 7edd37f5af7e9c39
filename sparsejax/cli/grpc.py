"""Serve a model over gRPC, with health, reflection and vLLM's engine service on the same port.

sparsejax grpc                                       # the model inside the package, on 127.0.0.1:50051
sparsejax grpc path/or/hub-id --host 0.0.0.0 --tls-cert server.pem --tls-key server.key --api-key SECRET

SIGTERM or Ctrl-C lets running requests finish for --shutdown-timeout seconds; a second one stops at once.
"""

from __future__ import annotations

import argparse

from sparsejax.cli.servers import add_server_options, needs, read_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from sparsejax.serve.grpc.options import GrpcOptions

    add_server_options(parser, "gRPC server", GrpcOptions)


def run(args: argparse.Namespace) -> int:
    from sparsejax.serve.grpc.options import GrpcOptions

    settings, limits, config = read_server(args, GrpcOptions)
    with needs("serve"):
        from sparsejax.serve.grpc.server import run as run_server
        from sparsejax.serve.lifecycle import leave
        from sparsejax.serve.service import Service

    service = Service(config, limits)
    run_server(service, settings)
    leave(service)
    return 0
