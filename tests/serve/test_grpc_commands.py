"""`sparsejax grpc` as it is started and as it ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("grpc_health")
pytest.importorskip("grpc_reflection")

import sparsejax.config  # noqa: E402
from sparsejax.cli import main  # noqa: E402
from sparsejax.config import EngineConfig  # noqa: E402
from sparsejax.errors import SparseJaxError  # noqa: E402
from sparsejax.serve.admission import ServiceLimits  # noqa: E402
from sparsejax.serve.grpc.client import GrpcClient  # noqa: E402
from sparsejax.serve.grpc.options import GrpcOptions  # noqa: E402
from tests.serve.grpc_live import wait_for  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LONG = {"max_tokens": 200, "ignore_eos": True, "temperature": 0.0}


def test_the_command_takes_every_setting(monkeypatch):
    calls = []
    monkeypatch.setattr("sparsejax.serve.grpc.server.run", lambda service, options: calls.append((service, options)))
    argv = ["some/model", "--port", "0", "--api-key", "a", "--no-reflection", "--max_requests", "9"]
    assert main(["grpc", *argv, "--max-num-seqs", "3", "--max-message-bytes", "1MiB"]) == 0
    ((service, options),) = calls
    assert options == GrpcOptions(port=0, api_key=["a"], reflection=False, max_message_bytes=1 << 20)
    assert service.limits == ServiceLimits(max_requests=9)
    assert service.config == EngineConfig("some/model", max_num_seqs=3, warmup="full")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--host", "0.0.0.0"], "nothing is encrypted"),
        (["--tls-cert", "none.pem", "--tls-key", "none.key"], "cannot be read"),
        (["--port", "-4"], "no port"),
    ],
)
def test_settings_that_cannot_be_used(argv, words, capsys):
    assert main(["grpc", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_port_in_use_is_known_before_the_model_loads(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["grpc", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grpc", None)
    for name in [name for name in sys.modules if name.startswith("sparsejax.serve.grpc.")]:
        if not name.endswith(".options"):
            monkeypatch.delitem(sys.modules, name)
    assert main(["grpc"]) == 2
    assert "sparsejax[serve]" in capsys.readouterr().err


@contextlib.contextmanager
def process() -> Iterator[tuple[subprocess.Popen, GrpcClient]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "scripts/serve_grpc.py", "--port", str(port), "--warmup", "none"]
    settings = ["--compile-cache-dir", sparsejax.config.DEFAULT_COMPILE_CACHE]
    settings += ["--max-num-seqs", "2", "--max-model-len", "512"]
    with subprocess.Popen([*command, *settings], cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            with GrpcClient(f"127.0.0.1:{port}", timeout=60) as client:
                wait_for(lambda: ready(client), 90)
                yield server, client
        finally:
            server.kill()


def ready(client: GrpcClient) -> bool:
    try:
        return client.ready()
    except SparseJaxError:
        return False


def test_a_signal_drains_and_a_second_one_stops():
    with process() as (server, client):
        pieces = client.stream("Once", {**LONG, "max_tokens": 40})
        next(pieces)
        server.send_signal(signal.SIGTERM)
        assert list(pieces)[-1].outputs[0].finish_reason == "length"
        assert server.wait(30) == 0
        assert '"drained"' in server.stderr.read()
    with process() as (server, client):
        pieces = client.stream("Once", {**LONG, "max_tokens": 500})
        next(pieces)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: not ready(client))
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 130
