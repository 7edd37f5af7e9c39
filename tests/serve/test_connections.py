"""Sockets of clients that send too slowly, too much, or to a server that is full."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator

import httpx2
import pytest

from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.logs import JsonFormatter
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.openai.refusals import GENERATING
from tests.serve.live import Live, live

HURRIED = HttpOptions(port=0, head_timeout=0.4, body_timeout=0.4)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
GOOD = {"prompt": "x", "max_tokens": 2}


@pytest.fixture
def strict(server) -> Iterator[Live]:
    with live(server.beside(), HURRIED, stop=False) as running:
        yield running


@contextlib.contextmanager
def full(server, options: HttpOptions = HURRIED) -> Iterator[Live]:
    """A server whose engine has nothing to do and whose queue has no room."""
    service = server.beside(ServiceLimits(max_requests=2))
    ticket = service.admission.take(2)
    with live(service, options, stop=False) as running:
        yield running
    assert service.admission.requests == 2
    ticket.release()


def connect(server: Live) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def drip(sock: socket.socket, data: bytes) -> bytes:
    """Sends a byte now and then until the server closes the connection; what it said."""
    start = time.monotonic()
    with contextlib.suppress(OSError):  # it is closed
        for place in range(len(data)):
            assert time.monotonic() - start < 15, "the server waits for as long as it takes"
            sock.sendall(data[place : place + 1])
            time.sleep(0.05)
    return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(1 << 16):
            received += part
    return received


def answer(sock: socket.socket) -> tuple[int, dict[str, str], dict]:
    """Reads one answer with a length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += (part := sock.recv(1 << 16))
        assert part, received
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += sock.recv(1 << 16)
    return int(status.split()[1]), headers, json.loads(body)


def error_of(received: bytes) -> dict:
    return json.loads(received.partition(b"\r\n\r\n")[2])["error"]


def test_a_head_that_comes_byte_by_byte_is_cut_off(strict):
    with connect(strict) as sock:
        received = drip(sock, HEAD % 5 + b"X" * 1000)
    assert received.startswith(b"HTTP/1.1 408 ") and error_of(received)["type"] == "timeout_error"
    with strict.http() as http:
        assert http.post("/v1/completions", json=GOOD).status_code == 200


def test_a_connection_on_which_nothing_is_said_is_closed(strict):
    with connect(strict) as sock:
        assert read_all(sock) == b""


def test_the_second_head_of_a_connection_has_a_deadline_too(strict):
    with connect(strict) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(sock)[0] == 200
        assert drip(sock, HEAD % 5 + b"X" * 1000).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_nobody_reads_does_not_hold_the_connection(strict):
    with connect(strict) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert answer(sock)[0] == 200
        assert drip(sock, b"y" * 999) == b""


def test_a_body_that_comes_byte_by_byte_is_cut_off(strict):
    with connect(strict) as sock:
        sock.sendall(HEAD % 1000)
        assert drip(sock, b'{"prompt": "' + b"x" * 900).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_leaves_within_its_body_is_no_bug(strict, caplog):
    with caplog.at_level(logging.INFO, logger="sparsejax"):
        for leave in (lambda sock: sock.shutdown(socket.SHUT_WR), lambda sock: None):
            with connect(strict) as sock:
                sock.sendall(HEAD % 1000 + b"{")
                time.sleep(0.1)
                leave(sock)
        end = time.monotonic() + 20
        while len(said := [one.fields for one in caplog.records if "status" in getattr(one, "fields", ())]) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert [one["status"] for one in said] == [499, 499]
    assert not any(record.levelno >= logging.ERROR for record in caplog.records)


def test_a_head_without_end_is_cut_off(strict):
    with connect(strict) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(b"GET /health HTTP/1.1\r\nX: ")
            for _ in range(20):
                sock.sendall(b"y" * 10_000)
                time.sleep(0.01)
        received = read_all(sock)
    assert received == b"" or received.startswith(b"HTTP/1.1 431 ")


def test_what_is_no_http_is_told_so_in_json(strict):
    with connect(strict) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        received = read_all(sock)
    assert received.startswith(b"HTTP/1.1 400 ") and error_of(received)["type"] == "invalid_request_error"


def test_deadlines_are_for_clients_and_not_for_answers(strict):
    """An answer may take longer than a head; the connection serves the next request after it."""
    with connect(strict) as sock:
        for tokens in (700, 1):
            body = json.dumps({**GOOD, "max_tokens": tokens, "ignore_eos": True}).encode()
            sock.sendall(HEAD % len(body) + body)
            status, _, said = answer(sock)
            assert status == 200 and said["usage"]["completion_tokens"] == tokens


def test_a_full_server_refuses_before_it_reads(server):
    """The answer comes although no byte of the body has; the connection goes on once the body is there."""
    with full(server) as busy, connect(busy) as sock:
        for sent in range(1, 4):
            sock.sendall(HEAD % 500)
            status, headers, said = answer(sock)
            assert status == 503 and int(headers["retry-after"]) >= 1 and headers["x-request-id"]
            assert said["error"]["code"] == "overloaded" and "2 requests are in its queue" in said["error"]["message"]
            sock.sendall(b"{" * 500)
            assert busy.service.rejected["overloaded"] == sent


def test_the_rest_of_a_refused_body_has_a_deadline(server):
    with full(server) as busy, connect(busy) as sock:
        sock.sendall(HEAD % 1000)
        assert answer(sock)[0] == 503
        assert drip(sock, b"x" * 999) == b""


def test_large_bodies_that_are_refused_still_get_their_answer(server):
    """Also where the client closes after it: all was read, so that no reset takes the answer away."""
    with full(server, HttpOptions(port=0)) as busy, connect(busy) as sock:
        sock.sendall((HEAD % (6 << 20)).replace(b"Host", b"Connection: close\r\nHost") + b"x" * (6 << 20))
        assert read_all(sock).startswith(b"HTTP/1.1 503 ")


def test_what_a_full_server_still_answers(server, caplog):
    options = HttpOptions(port=0, api_key=("secret",))
    with full(server, options) as busy, busy.http() as http, caplog.at_level(logging.INFO, logger="sparsejax"):
        assert http.post("/v1/completions", json=GOOD, headers={"Authorization": "Bearer other"}).status_code == 401
        assert http.post("/tokenize", json={"prompt": "x"}).status_code == 200
        assert http.get("/v1/models").status_code == 200 and http.get("/health").status_code == 200
        for route in GENERATING:
            assert [http.post(route, content=data).status_code for data in (b"{}", b"no json")] == [503] * 2
        text = http.get("/metrics").text
        time.sleep(1.2)  # the line of the refusals is written
    assert busy.service.rejected == {"overloaded": 2 * len(GENERATING)}
    for route in GENERATING:
        assert f'sparsejax:http_requests_total{{route="{route}",status="503"}} 2.0' in text
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    refused = [line["requests"] for line in lines if line["message"] == "refused"]
    assert 1 <= len(refused) <= 2 and sum(sum(one.values()) for one in refused) == 2 * len(GENERATING)
    assert not any(line.get("status") == 503 for line in lines)


def test_room_is_there_again_after_a_refusal(server):
    service = server.beside(ServiceLimits(max_requests=1))
    with live(service, HURRIED, stop=False) as busy, httpx2.Client(base_url=busy.url, timeout=30) as http:
        ticket = service.admission.take(1)
        assert http.post("/v1/completions", json=GOOD).status_code == 503
        ticket.release()
        assert http.post("/v1/completions", json=GOOD).status_code == 200
        ticket = service.admission.take(1)
        ticket.release()
        prompts = service.admission.take(1)
        prompts.add_tokens(service.limits.max_prompt_tokens)
        assert http.post("/v1/completions", json=GOOD).status_code == 503
        prompts.release()


def test_every_route_that_takes_room_is_known(server):
    with server.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    assert {path for path, methods in paths.items() if path.startswith("/v1/") and "post" in methods} == {*GENERATING}
