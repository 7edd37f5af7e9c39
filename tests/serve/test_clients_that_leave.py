"""Clients that go away, read slowly or ask too much: nothing is held for them, and others do not notice."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time

import httpx2
import pytest

from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.openai.options import HttpOptions
from tests.serve.live import MODEL, live

LONG = {"model": MODEL, "prompt": " box: 204;", "max_tokens": 600, "ignore_eos": True, "temperature": 0}


def raw(server, body: dict) -> socket.socket:
    """Sends a request over a plain socket."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    sock = socket.create_connection((host, int(port)), timeout=30)
    sock.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_aborts(server, stream):
    aborted = server.service.stats()["num_aborted"]
    socks = [raw(server, {**LONG, "stream": stream}) for _ in range(6)]
    for sock in socks[::2]:
        if stream:
            assert b"200 OK" in sock.recv(200)
    deadline = time.monotonic() + 60
    while len(server.service.engine.request_ids()) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for sock in socks:
        sock.close()
    server.settle()
    assert server.service.stats()["num_aborted"] > aborted


def test_a_client_that_does_not_read_holds_nothing(server):
    """Its answer is long; the engine finishes it at its own speed, and the pages are free with nothing read yet."""
    sock = raw(server, {**LONG, "stream": True, "logprobs": 3, "n": 1})
    deadline = time.monotonic() + 30
    while not server.service.admission.requests:
        assert time.monotonic() < deadline
    server.settle()
    received = b""
    while b"[DONE]" not in received:
        part = sock.recv(1 << 16)
        assert part
        received += part
    events = [json.loads(line[6:]) for line in received.decode().split("\r\n") if line.startswith("data: {")]
    assert sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in events) == 600
    sock.close()


def test_overload_is_refused_and_bounded(server):
    """Ten times what fits: the queue stays at its bound, the rest is told when to come again, what is in is served."""
    service = server.beside(ServiceLimits(max_requests=6))
    held: list[int] = []

    async def ask(http: httpx2.AsyncClient) -> httpx2.Response:
        answer = await http.post("/v1/completions", json={**LONG, "max_tokens": 40})
        held.append(service.admission.requests)
        return answer

    async def run(url: str) -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
            return await asyncio.gather(*(ask(http) for _ in range(60)))

    with live(service, stop=False) as full:
        answers = asyncio.run(run(full.url))
        full.settle()
        assert service.rejected["overloaded"] == sum(answer.status_code == 503 for answer in answers) > 0
    good = [answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200]
    assert len(good) >= 6 and len(set(good)) == 1 and max(held) <= 6
    for answer in answers:
        assert answer.status_code in (200, 503)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"


def test_keys_and_their_limits(server, monkeypatch):
    monkeypatch.setenv("SPARSEJAX_API_KEY", "third")
    options = HttpOptions(port=0, api_key=("first", "second"), key_requests_per_minute=4, key_concurrency=1)
    with live(server.beside(), options, stop=False) as guarded, httpx2.Client(base_url=guarded.url) as http:

        def models(authorization: str) -> httpx2.Response:
            return http.get("/v1/models", headers={"Authorization": authorization})

        for wrong in ("", "Bearer wrong", "Basic first", "first"):
            assert models(wrong).status_code == 401 and models(wrong).json()["error"]["code"] == "invalid_api_key"
        for open_path in ("/health", "/ready", "/metrics", "/version"):
            assert http.get(open_path).status_code == 200
        assert [models("Bearer first").status_code for _ in range(6)] == [200] * 4 + [429] * 2
        late = models("Bearer first")
        assert 1 <= int(late.headers["retry-after"]) <= 60 and late.json()["error"]["code"] == "rate_limit_exceeded"
        assert models("Bearer third").status_code == 200
        body, second = {**LONG, "stream": True}, {"Authorization": "Bearer second"}
        with http.stream("POST", "/v1/completions", headers=second, json=body) as one:
            assert one.status_code == 200
            assert models("Bearer second").status_code == 429
        guarded.settle()
        time.sleep(0.1)
        assert models("Bearer second").status_code == 200


def test_a_body_that_comes_too_slowly_or_is_too_large(server):
    options = HttpOptions(port=0, body_timeout=0.2, max_body_bytes=1000)
    with live(server.beside(), options, stop=False) as strict:
        host, port = strict.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
            assert b" 408 " in sock.recv(100)
        large = httpx2.post(f"{strict.url}/v1/completions", content=b"x" * 2000)
        assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"


def test_soak_in_small(server):
    """Streaming clients beside clients that leave at random: every survivor's text is right and no page stays."""
    from scripts.soak import soak

    report = soak(server.url, model=MODEL, clients=6, leavers=6, seconds=3.0, seed=random.randrange(99), key=server.key)
    assert report["answers"] > 0 and report["left"] > 0
    assert report["wrong"] == 0 and report["errors"] == 0, report
    server.settle()
