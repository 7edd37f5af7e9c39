"""`sparsejax serve` as it is started, and `sparsejax chat --url` against a server."""

from __future__ import annotations

import asyncio
import io
import signal
import socket
import sys
import threading

import pytest

from sparsejax.cli import main
from sparsejax.config import EngineConfig
from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.openai.options import HttpOptions
from tests.serve.tiny import tiny_service


@pytest.fixture
def started(monkeypatch):
    """What the command would serve."""
    calls: list[tuple] = []
    monkeypatch.setattr("sparsejax.serve.openai.server.run", lambda service, http: calls.append((service, http)))
    return calls


def test_serve_takes_every_setting(started):
    argv = ["serve", "some/model", "--port", "0", "--api-key", "a", "--api-key=b", "--max_requests", "9"]
    assert main([*argv, "--max-num-seqs", "3", "--sparsity", "quest", "--trust-request-chat-template"]) == 0
    ((service, http),) = started
    assert http == HttpOptions(port=0, api_key=["a", "b"], trust_request_chat_template=True)
    assert service.limits == ServiceLimits(max_requests=9)
    assert service.config == EngineConfig("some/model", max_num_seqs=3, sparsity="quest", warmup="full")
    assert main(["serve", "--warmup", "none"]) == 0
    assert started[1][0].config == EngineConfig(warmup="none")


@pytest.mark.parametrize(
    "argv",
    [["--port", "70000"], ["--tool-call-parser", "x"], ["--max-requests", "0"], ["--page-size", "17"], ["--api-key="]],
)
def test_serve_refuses_bad_settings(started, argv, capsys):
    assert main(["serve", *argv]) == 2
    assert "ConfigError" in capsys.readouterr().err and not started


def test_serve_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("sparsejax.serve.openai.")]:
        if not name.endswith(".options"):
            monkeypatch.delitem(sys.modules, name)
    assert main(["serve"]) == 2
    assert "sparsejax[serve]" in capsys.readouterr().err


def test_one_engine_behind_both_protocols(monkeypatch):
    """`serve --grpc-port`: what HTTP and gRPC answer comes from the same engine, and a signal ends both."""
    httpx2, client = pytest.importorskip("httpx2"), pytest.importorskip("sparsejax.serve.grpc.client")
    ports, answers, service = [], {}, tiny_service()
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])

    def ask() -> None:
        try:
            asyncio.run(service.loaded())
            asked = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
            body = {"prompt": [5, 6, 7], **asked, "return_token_ids": True}
            said = httpx2.post(f"http://127.0.0.1:{ports[0]}/v1/completions", json=body, timeout=60).json()
            answers["http"] = said["choices"][0]["token_ids"]
            with client.GrpcClient(f"127.0.0.1:{ports[1]}", timeout=60) as other:
                answers["grpc"] = other.generate([5, 6, 7], asked).outputs[0].token_ids
            answers["requests"] = service.stats()["num_requests"]
        finally:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("sparsejax.serve.openai.server.use_json_logs", lambda level: None)
    monkeypatch.setattr("sparsejax.serve.service.Service", lambda config, limits: service)
    asking = threading.Thread(target=ask)
    asking.start()
    assert main(["serve", "--port", str(ports[0]), "--grpc-port", str(ports[1])]) == 0
    asking.join()
    assert answers["http"] == answers["grpc"] and len(answers["grpc"]) == 6 and answers["requests"] == 2
    assert service.status.value == "stopped"


def talk(monkeypatch, lines: list[str], *argv: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", *argv, "--max-tokens", "6", "--temperature", "0"])


def test_chat_with_a_server(server, client, monkeypatch, capsys):
    wanted = []
    messages = []
    for line in ("Hello", "Again"):
        messages.append({"role": "user", "content": line})
        answer = client.chat.completions.create(model="", messages=messages, max_tokens=6, temperature=0)
        wanted.append(answer.choices[0].message.content)
        messages.append({"role": "assistant", "content": wanted[-1]})
    assert talk(monkeypatch, ["Hello", "Again"], "--url", server.url) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in wanted) + "\n"
    assert talk(monkeypatch, ["Hello"], "--url", f"{server.url}/v1/", "--model", "other") == 0
    assert "404" in capsys.readouterr().err


def test_chat_says_why_a_server_cannot_be_used(server, monkeypatch, capsys):
    assert talk(monkeypatch, [], "--url", "http://127.0.0.1:9") == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert talk(monkeypatch, [], "--url", "nonsense") == 2
    assert talk(monkeypatch, [], "--url", server.url, "--page-size", "16") == 2
    assert "--page-size" in capsys.readouterr().err
