"""`GrpcOptions`: every setting of the gRPC server. Imports nothing of gRPC."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from sparsejax.errors import ConfigError
from sparsejax.serve.checks import above_zero, at_least_zero, check_server


@dataclass(frozen=True)
class GrpcOptions:
    """Settings of the gRPC server.

    Attributes:
        host: address to listen on; 0.0.0.0 is every one, and then needs TLS or --insecure.
        port: port to listen on; 0 takes a free one.
        api_key: token that clients must send as metadata `authorization: Bearer TOKEN` (give it again for more);
            the environment variable SPARSEJAX_API_KEY holds one too. Without any, everybody may ask.
        served_model_name: name of the model in requests (give it again for aliases).
        tls_cert: certificate chain in PEM; turns on TLS.
        tls_key: private key of the certificate in PEM.
        tls_client_ca: certificates in PEM that sign clients; turns on mutual TLS.
        insecure: listen without TLS on more than the loopback device.
        reflection: let clients list the services and their messages.
        vllm_service: serve vllm.grpc.engine.VllmEngine on the same port if the package smg-grpc-proto is installed.
        max_message_bytes: largest message in either direction.
        message_timeout: seconds in which the message of a call must have arrived.
        max_concurrent_calls: calls beyond this many are refused with RESOURCE_EXHAUSTED.
        keepalive: seconds without traffic after which a client is probed.
        keepalive_timeout: seconds that a probe may stay unanswered.
        max_connection_age: seconds after which clients are asked to connect anew, for balancers; 0 is never.
        shutdown_timeout: seconds that running requests get to finish after SIGTERM.
        log_level: debug, info, warning or error; prompts and answers are never logged.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    api_key: Sequence[str] = ()
    served_model_name: Sequence[str] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    insecure: bool = False
    reflection: bool = True
    vllm_service: bool = True
    max_message_bytes: int = 64 << 20
    message_timeout: float = 30.0
    max_concurrent_calls: int = 2048
    keepalive: float = 60.0
    keepalive_timeout: float = 20.0
    max_connection_age: float = 0.0
    shutdown_timeout: float = 30.0
    log_level: str = "info"

    def __post_init__(self) -> None:
        check_server(self)
        above_zero(self, "max_message_bytes", "message_timeout", "max_concurrent_calls")
        above_zero(self, "keepalive", "keepalive_timeout")
        at_least_zero(self, "max_connection_age")
        self._check_tls()

    def _check_tls(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both tls_cert and tls_key; one of them is missing.")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("tls_client_ca (mutual TLS) needs the server's own tls_cert and tls_key.")
        if self.tls_cert is None and not self.insecure and not _is_loopback(self.host):
            raise ConfigError(
                f"host={self.host!r} is open to other machines and nothing is encrypted: give tls_cert and tls_key, "
                "or say insecure if something in front of this server encrypts."
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
