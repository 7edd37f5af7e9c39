"""Whatever a client sends, the answer is a clear refusal or a right answer: never a 500, never silence."""

from __future__ import annotations

import json
import random
import socket

import pytest

from tests.serve.live import MODEL

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
RAW = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe{}",
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": NaN}',
    b'{"temperature": Infinity}',
    b'{"temperature": 1e999, "prompt": "x"}',
    b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b'{"max_tokens": 99999999999999999999999, "prompt": "x"}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"guided_json": ' + b'{"not":' * 150 + b"{}" + b"}" * 150 + b', "prompt": "x"}',
    b'{"prompt": "x", "prompt": 5}',
    b"\x00" * 1000,
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": 1, "tools": 2}}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1/0 }}"}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
    b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f"}}], "tool_choice": 5}',
    b'{"tokens": [-1]}',
    b'{"tokens": []}',
    b'{"tokens": [99999999999999999999]}',
]
READ_BY_SOME = (b'{"temperature": 1e', b'{"max_tokens": 99999999999999999999999', b'{"guided_json"')
"""Their mistakes are in fields that not every route reads."""
FIELDS = (
    *("prompt", "messages", "input", "tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "logprobs", "top_logprobs", "echo"),
    *("logit_bias", "stop_token_ids", "allowed_token_ids", "bad_words", "presence_penalty", "repetition_penalty"),
    *("stream", "stream_options", "response_format", "structured_outputs", "guided_regex", "guided_json", "tools"),
    *("tool_choice", "sparsity", "priority", "request_id", "model", "prompt_logprobs", "text", "instructions"),
    *("guided_grammar", "guided_choice", "documents", "continue_final_message", "suffix", "unknown_field"),
)


def anything(rng: random.Random, depth: int = 3):
    """A JSON value of any type, the ones that break parsers among them."""
    plain = [
        *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e308, 5e-324, 1e-9),
        *("", "x", "\x00", "\u202e", "é", "🎉", "a" * 3000, "{{ x }}", "<bos>", "auto", "required", "json_object"),
        *(MODEL, "quest", "(", "[a-z]{2}", "start: ", "__class__", "../../x"),
    ]
    if depth == 0 or rng.random() < 0.6:
        return rng.choice(plain)
    if rng.random() < 0.5:
        return [anything(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    keys = "type json regex schema role content name function 1 -1 preset budget é".split()
    return {rng.choice(keys): anything(rng, depth - 1) for _ in range(rng.randint(0, 4))}


def likely(rng: random.Random) -> dict:
    """A body that is nearly right: good values for what is needed, anything for a few other fields."""
    body: dict = {"prompt": " box:", "messages": [{"role": "user", "content": "x"}], "input": "x", "tokens": [5, 6]}
    body |= {"max_tokens": 3, "max_output_tokens": 3}
    for name in rng.sample(FIELDS, rng.randint(1, 3)):
        body[name] = anything(rng)
    return body


def check(response) -> None:
    assert response.status_code < 500, (response.status_code, response.text)
    if response.status_code == 200:
        return
    error = response.json()["error"]
    assert error["message"] and error["type"] and {"param", "code"} <= set(error)


@pytest.mark.parametrize("route", ROUTES)
def test_broken_bodies(http, server, route):
    for body in RAW:
        response = http.post(route, content=body)
        check(response)
        if not body.startswith((b'{"messages', b'{"tokens', b'{"prompt": "x", "p', *READ_BY_SOME)):
            assert response.status_code == 400, (body[:60], response.text)
    assert http.post(route).status_code == 400
    server.settle()


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_random_bodies(http, server, seed):
    rng = random.Random(seed)
    statuses = set()
    for _ in range(60):
        body = likely(rng) if rng.random() < 0.8 else anything(rng)
        if isinstance(body, dict) and body.get("max_tokens") is None:
            body["max_tokens"] = 3  # a good request without a limit would run for long
        response = http.post(rng.choice(ROUTES), content=json.dumps(body))
        check(response)
        statuses.add(response.status_code)
    assert {200, 400} <= statuses
    server.settle()
    assert server.service.status.value == "ready"


def test_unknown_routes_and_methods(http):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("POST", "/v1/models/x/y", 405),
        ("GET", "/v1/models/%ff%00", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
    ):
        response = http.request(method, path)
        assert response.status_code == status, path
        check(response)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
        b"GET /v1/models HTTP/1.1\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
)
def test_broken_http(http, server, data):
    """The connection ends with a refusal or without an answer; the server goes on."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = sock.recv(1000)
        except OSError:
            answer = b""
    assert b" 500 " not in answer.split(b"\r\n")[0]
    assert http.get("/health").status_code == 200
    server.settle()
