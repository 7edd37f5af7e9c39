"""Who may talk to the gRPC server: tokens, TLS and mutual TLS with certificates made here."""

from __future__ import annotations

import datetime
import ipaddress

import pytest

pytest.importorskip("grpc_health")
pytest.importorskip("grpc_reflection")
x509 = pytest.importorskip("cryptography.x509")

import grpc  # noqa: E402
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

from sparsejax.errors import ConfigError, SparseJaxError  # noqa: E402
from sparsejax.serve.errors import Unavailable  # noqa: E402
from sparsejax.serve.grpc.client import GrpcClient  # noqa: E402
from sparsejax.serve.grpc.options import GrpcOptions  # noqa: E402
from tests.serve.grpc_live import live_grpc, wait_for  # noqa: E402
from tests.serve.tiny import tiny_service  # noqa: E402


def certificate(folder, name: str, signer=None):
    """A key and a certificate in files; its own signer unless one is given."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer, issuer_key = (subject, key) if signer is None else signer
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / f"{name}.pem").write_bytes(made.public_bytes(pem))
    plain = serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return subject, key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    signer = certificate(folder, "ca")
    certificate(folder, "server", signer)
    certificate(folder, "client", signer)
    certificate(folder, "stranger")
    return folder


def credentials(folder, client: str | None = None) -> grpc.ChannelCredentials:
    own = () if client is None else ((folder / f"{client}.key").read_bytes(), (folder / f"{client}.pem").read_bytes())
    return grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *own)


def test_tls_and_tokens(folder):
    options = GrpcOptions(
        port=0, tls_cert=f"{folder}/server.pem", tls_key=f"{folder}/server.key", api_key=("one", "two")
    )
    with live_grpc(tiny_service(), options) as live:
        for token in ("one", "two"):
            with live.client(credentials=credentials(folder), token=token) as client:
                assert client.generate([1, 2, 3]).finished
        for token in (None, "wrong", "ONE", "o"):
            with live.client(credentials=credentials(folder), token=token) as client:
                wait_for(client.ready)  # health asks for no token
                for call in (lambda: client.generate([1, 2, 3]), client.stats, lambda: list(client.stream([1]))):
                    with pytest.raises(SparseJaxError, match="UNAUTHENTICATED"):
                        call()
        with live.client(token="one", timeout=2) as client, pytest.raises((Unavailable, TimeoutError)):
            client.generate([1, 2, 3])  # plain text


def test_mutual_tls(folder):
    options = GrpcOptions(
        port=0,
        tls_cert=f"{folder}/server.pem",
        tls_key=f"{folder}/server.key",
        tls_client_ca=f"{folder}/ca.pem",
    )
    with live_grpc(tiny_service(), options) as live:
        with live.client(credentials=credentials(folder, "client")) as client:
            assert client.generate([1, 2, 3]).finished
        for who in (None, "stranger"):
            with GrpcClient(live.target, credentials=credentials(folder, who), timeout=5) as client:
                with pytest.raises((Unavailable, TimeoutError)):
                    client.generate([1, 2, 3])


def test_the_environment_may_hold_a_token(monkeypatch):
    monkeypatch.setenv("SPARSEJAX_API_KEY", "hidden")
    with live_grpc(tiny_service(), GrpcOptions(port=0)) as live:
        with live.client(token="hidden") as client:
            assert client.generate([1, 2, 3]).finished
        with live.client() as client, pytest.raises(SparseJaxError, match="UNAUTHENTICATED"):
            client.generate([1, 2, 3])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "nothing is encrypted"),
        ({"host": "example.org"}, "nothing is encrypted"),
        ({"tls_cert": "a"}, "both"),
        ({"tls_client_ca": "a"}, "mutual TLS"),
        ({"port": 70000}, "no port"),
        ({"api_key": ("ä",)}, "ASCII"),
        ({"max_message_bytes": 0}, "above 0"),
        ({"shutdown_timeout": -1.0}, "at least 0"),
        ({"log_level": "loud"}, "log_level"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        GrpcOptions(**settings)


def test_loopback_and_insecure_need_no_certificate():
    for settings in ({"host": "::1"}, {"host": "127.0.0.2"}, {"host": "0.0.0.0", "insecure": True}):
        assert GrpcOptions(**settings).tls_cert is None
