"""The gRPC server: its services, health and reflection on one port, from the first load to the last request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sparsejax.errors import ConfigError
from sparsejax.serve.grpc.access import Access
from sparsejax.serve.grpc.control import Control
from sparsejax.serve.grpc.inference import Inference
from sparsejax.serve.grpc.options import GrpcOptions
from sparsejax.serve.grpc.protos import control_pb2_grpc, inference_pb2_grpc
from sparsejax.serve.keys import KeyRing
from sparsejax.serve.lifecycle import catch_signals, live
from sparsejax.serve.logs import use_json_logs
from sparsejax.serve.service import Service, Status

log = logging.getLogger("sparsejax.serve")
OURS = ("sparsejax.v1.Inference", "sparsejax.v1.Control")
VLLM = "vllm.grpc.engine.VllmEngine"
HEALTH_SECONDS = 0.05
LAST_WORDS = 1.0
"""Seconds that finished answers get to leave the sockets."""


class GrpcServer:
    """Serves `service`, which the caller starts and stops.

    Attributes:
        services: full names of the services that health knows.
        port: where it listens, once `start` has returned.
    """

    def __init__(self, service: Service, options: GrpcOptions):
        self.service, self.options = service, options
        names = service.names(options.served_model_name)
        access = Access(service, KeyRing(options.api_key), options.message_timeout)
        self._server = grpc.aio.server(
            interceptors=[access],
            options=_channel_options(options),
            maximum_concurrent_rpcs=options.max_concurrent_calls,
        )
        self.services = OURS
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(service, names), self._server)
        if options.vllm_service and self._add_vllm(names):
            self.services = (*OURS, VLLM)
        listed = (*self.services, health.SERVICE_NAME, *([reflection.SERVICE_NAME] if options.reflection else []))
        control_pb2_grpc.add_ControlServicer_to_server(Control(service, names, listed), self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if options.reflection:
            reflection.enable_server_reflection(listed, self._server)
        self._reports: asyncio.Task[None] | None = None
        self.port = 0

    def _add_vllm(self, names: tuple[str, ...]) -> bool:
        """Adds vLLM's service, if its stubs are installed."""
        try:
            from sparsejax.serve.grpc.vllm import add_vllm
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("smg_grpc_proto"):
                raise
            log.warning("%s is not served: pip install smg-grpc-proto", VLLM)
            return False
        add_vllm(self._server, self.service, names)
        return True

    async def start(self) -> None:
        """Listens and answers; requests are refused until the service is ready.

        Raises:
            ConfigError: the address or the certificates cannot be used.
        """
        options = self.options
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{options.port}"
        try:
            if options.tls_cert is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, _credentials(options))
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: choose another host or port.") from error
        await self._publish()
        await self._server.start()
        self._reports = asyncio.create_task(self._report())

    async def stop(self) -> None:
        """Refuses new calls and closes the others after they had time for their last words."""
        if self._reports is not None:
            self._reports.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(LAST_WORDS)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            await self._publish()

    async def _publish(self) -> None:
        ready = self.service.status is Status.READY and self.service.alive
        status = health_pb2.HealthCheckResponse
        for name in ("", *self.services):
            await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)


def _channel_options(options: GrpcOptions) -> list[tuple[str, int]]:
    settings = {
        "grpc.max_receive_message_length": options.max_message_bytes,
        "grpc.max_send_message_length": options.max_message_bytes,
        "grpc.keepalive_time_ms": round(1000 * options.keepalive),
        "grpc.keepalive_timeout_ms": round(1000 * options.keepalive_timeout),
        "grpc.keepalive_permit_without_calls": 1,
        # Clients may ping every 10 s, also while nothing runs; more often is answered with GOAWAY.
        "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        "grpc.http2.max_ping_strikes": 2,
        "grpc.so_reuseport": 0,
    }
    if options.max_connection_age:
        settings["grpc.max_connection_age_ms"] = round(1000 * options.max_connection_age)
        settings["grpc.max_connection_age_grace_ms"] = round(1000 * options.shutdown_timeout) + 1000
    return list(settings.items())


def _credentials(options: GrpcOptions) -> grpc.ServerCredentials:
    ca = None if options.tls_client_ca is None else _read("tls_client_ca", options.tls_client_ca)
    pair = (_read("tls_key", options.tls_key), _read("tls_cert", options.tls_cert))
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


def _read(name: str, path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}={path!r} cannot be read: {error.strerror}.") from error
    if b"-----BEGIN" not in data:
        raise ConfigError(f"{name}={path!r} is not in PEM format.")
    return data


@contextlib.asynccontextmanager
async def serving(service: Service, options: GrpcOptions) -> AsyncIterator[GrpcServer]:
    """A server that answers until the block ends; then the service is stopped too."""
    server = GrpcServer(service, options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
        await service.stop()


async def serve(service: Service, options: GrpcOptions) -> None:
    """Serves until a signal comes. SIGTERM or SIGINT drains; a second one ends the process at once.

    Raises:
        SparseJaxError: the model cannot be loaded.
    """
    asked = catch_signals()
    async with serving(service, options) as server:

        def on_ready() -> None:
            fields = {"address": f"{options.host}:{server.port}", "bytes": service.memory()["total"]}
            log.info("ready", extra={"fields": fields})

        await live(service, asked, options.shutdown_timeout, on_ready)


def run(service: Service, options: GrpcOptions) -> None:
    """`serve` on a loop of its own."""
    use_json_logs(options.log_level)
    asyncio.run(serve(service, options))
