"""Replicas without Ray: who is asked for which prompt, and how a request travels to a replica and its answer back."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import types

import pytest

from sparsejax.config import EngineConfig
from sparsejax.errors import ConfigError

pytest.importorskip("starlette")
httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("prometheus_client")

from sparsejax.serve.admission import ServiceLimits  # noqa: E402
from sparsejax.serve.errors import Overloaded, Unavailable  # noqa: E402
from sparsejax.serve.openai.app import make_app  # noqa: E402
from sparsejax.serve.openai.options import HttpOptions  # noqa: E402
from sparsejax.serve.replicas.front import make_front, merged  # noqa: E402
from sparsejax.serve.replicas.options import RayOptions  # noqa: E402
from sparsejax.serve.replicas.prefix import BLOCK_BYTES, PrefixMap, leads, rank  # noqa: E402
from sparsejax.serve.replicas.relay import Call, relay  # noqa: E402

SYSTEM = "You answer questions about one long document. " * 8


def body(**fields) -> bytes:
    return json.dumps(fields).encode()


def talk(*texts: str) -> bytes:
    asked = [{"role": "user", "content": text} for text in texts]
    return body(model="x", messages=[{"role": "system", "content": SYSTEM}, *asked])


def shared(one: bytes, other: bytes) -> int:
    pairs = zip(leads(one), leads(other), strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(leads(one)), len(leads(other))))


def test_prompts_share_the_blocks_of_their_common_prefix():
    assert shared(talk("a", "b"), talk("a", "c")) >= len(SYSTEM) // BLOCK_BYTES
    assert shared(talk("a"), talk("a", "more")) >= len(SYSTEM) // BLOCK_BYTES
    ids = list(range(100))
    assert shared(body(prompt=ids), body(prompt=[*ids, 5], temperature=0)) >= len(leads(body(prompt=ids))) - 1 == 3
    assert shared(body(prompt=SYSTEM), body(prompt="x" + SYSTEM)) == 0
    assert shared(body(prompt=SYSTEM, tools=[{"name": "f"}]), body(prompt=SYSTEM)) == 0  # tools come before
    assert shared(body(input=SYSTEM, instructions="a"), body(input=SYSTEM, instructions="b")) == 0


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b'{"prompt": null}', b'{"prompt": "short"}'])
def test_what_has_no_long_prompt_has_no_blocks(data):
    assert leads(data) == ()


def test_a_prefix_goes_back_to_its_replica_and_new_ones_spread():
    held, rng = PrefixMap(), random.Random(0)
    owners, loads = {}, {"a": 0, "b": 0, "c": 0}
    families = [[rng.randrange(2**60) for _ in range(8)] for _ in range(30)]
    for blocks in rng.sample(families * 5, 150):
        chosen = rank([*blocks, rng.randrange(2**60)], loads, held, imbalance=4)[0]
        held.add(chosen, blocks)
        assert owners.setdefault(tuple(blocks), chosen) == chosen
    counts = [list(owners.values()).count(one) for one in loads]
    assert max(counts) - min(counts) <= 1


def test_a_busy_owner_is_passed_over():
    held = PrefixMap()
    held.add("a", [1, 2, 3])
    assert rank([1, 2, 9], {"a": 4, "b": 0}, held, imbalance=4) == ["a", "b"]
    assert rank([1, 2, 9], {"a": 5, "b": 0}, held, imbalance=4) == ["b", "a"]
    assert rank([7], {"a": 1, "b": 2}, held, imbalance=4) == ["a", "b"]
    held.add("b", [1])
    assert rank([1, 2, 9], {"a": 0, "b": 0}, held, imbalance=4) == ["a", "b"]  # it holds more


def test_old_blocks_and_gone_replicas_are_forgotten():
    held = PrefixMap(most=4)
    held.add("a", [1, 2, 3])
    held.add("a", [1, 8, 9])
    assert held.held("a") == 4 and held.matched("a", [1, 8, 9]) == 3
    assert held.matched("a", [1, 2, 3]) == 2  # the end of a prefix goes first
    held.keep({"b"})
    assert held.matched("a", [1]) == held.held("a") == 0


@pytest.mark.parametrize("given", [{"min_replicas": 0}, {"max_replicas": 1, "min_replicas": 2}, {"upscale_delay": -1}])
def test_settings_that_cannot_be_used(given):
    with pytest.raises(ConfigError):
        RayOptions(**given)


class Replicas:
    """Replicas that answer in this process, as Ray's would elsewhere."""

    def __init__(self, app):
        self.app, self.calls, self.closed, self.fail = app, [], 0, None

    async def forward(self, call: Call):
        self.calls.append(call)
        if self.fail is not None:
            raise self.fail
        try:
            async for piece in relay(self.app, call):
                yield piece
        finally:
            self.closed += 1

    async def reports(self):
        metrics = self.app.state.metrics.render()[0].decode()
        return [{"replica": name, "status": "ready", "requests": 2, "metrics": metrics} for name in ("r1", "r2")]


@pytest.fixture
def replicas(server):
    return Replicas(make_app(server.service))


def through(replicas: Replicas, options: HttpOptions | None = None) -> httpx2.AsyncClient:
    app = make_front(options or HttpOptions(), replicas.forward, replicas.reports)
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://front")


def test_answers_pass_unchanged(server, http, replicas):
    asked = {"prompt": " box: 204; " * 20, "max_tokens": 6, "temperature": 0}

    async def ask():
        async with through(replicas) as client:
            whole = await client.post("/v1/completions", json=asked)
            stream = await client.post("/v1/completions", json={**asked, "stream": True})
            bad = [await client.post("/v1/completions", content=b"{"), await client.get("/nothing")]
            return whole, stream, bad

    whole, stream, bad = asyncio.run(ask())
    wanted = http.post("/v1/completions", json=asked).json()
    assert whole.json()["choices"] == wanted["choices"]
    count = ("prompt_tokens", "completion_tokens", "total_tokens")  # the first one found nothing cached
    assert [whole.json()["usage"][name] for name in count] == [wanted["usage"][name] for name in count]
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == wanted["choices"][0]["text"]
    assert stream.text.endswith("data: [DONE]\n\n")
    assert [answer.status_code for answer in bad] == [400, 404]
    assert replicas.calls[0].leads == replicas.calls[1].leads != () and replicas.closed == 4
    server.settle()


def test_keys_and_bodies_are_checked_before_a_replica_is_asked(server, replicas):
    options = HttpOptions(api_key=["good"], key_requests_per_minute=1, max_body_bytes=50)

    async def ask():
        async with through(replicas, options) as client:
            ask = {"json": {"tokens": [5]}, "headers": {"Authorization": "Bearer good"}}
            return [
                (await client.post("/detokenize", json={"tokens": [5]})).status_code,
                (await client.get("/health")).status_code,
                (await client.post("/detokenize", **ask)).status_code,
                (await client.post("/detokenize", **ask)).status_code,
                (await client.post("/other", content=b"x" * 51)).status_code,
            ]

    assert asyncio.run(ask()) == [401, 200, 200, 429, 413]
    assert len(replicas.calls) == 1


@pytest.mark.parametrize("error", [Overloaded("busy", 2.0), Unavailable("gone")])
def test_what_replicas_refuse_is_503(replicas, error):
    replicas.fail = error

    async def ask():
        async with through(replicas) as client:
            return await client.post("/v1/completions", json={"prompt": "x"})

    answer = asyncio.run(ask())
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) == error.retry_after
    assert answer.json()["error"]["code"] == type(error).__name__.lower()


def test_reports_of_all_replicas_are_one(server, replicas):
    async def ask():
        async with through(replicas) as client:
            return [await client.get(path) for path in ("/metrics", "/ready", "/load")]

    metrics, ready, load = asyncio.run(ask())
    assert ready.json() == {"replicas": {"r1": "ready", "r2": "ready"}} and load.json() == {"server_load": 4}
    assert metrics.text.count("# TYPE vllm:prompt_tokens_total counter") == 1
    for name in ("r1", "r2"):
        assert f'sparsejax:status{{replica="{name}",status="ready"}} 1.0' in metrics.text
    assert merged([]) == b""


def test_a_client_that_leaves_ends_its_request(server, replicas):
    """The front's client goes away in the middle of a stream; the engine gets its pages back."""
    front = make_front(HttpOptions(), replicas.forward, replicas.reports)
    asked = body(prompt=" box", max_tokens=900, ignore_eos=True, stream=True)

    async def ask():
        seen, left = asyncio.Event(), asyncio.Event()
        inbox = [{"type": "http.request", "body": asked, "more_body": False}]

        async def receive():
            if inbox:
                return inbox.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message.get("body"):
                seen.set()

        scope = Call("POST", "/v1/completions", b"", [], asked, None).scope()
        task = asyncio.create_task(front(scope, receive, send))
        await seen.wait()
        left.set()
        await asyncio.wait_for(task, 20)

    asyncio.run(ask())
    assert replicas.closed == 1
    server.settle()


def test_an_application_that_fails_before_it_answers_is_no_silence():
    async def app(scope, receive, send):
        raise ValueError("bug")

    async def ask():
        return [piece async for piece in relay(app, Call("GET", "/", b"", [], b"", None))]

    with pytest.raises(ValueError, match="bug"):
        asyncio.run(ask())


def test_the_script_takes_every_setting(monkeypatch, capsys):
    import serve_ray

    calls = []
    cluster = types.ModuleType("cluster")
    cluster.run = lambda *given: calls.append(given)
    monkeypatch.setitem(sys.modules, "sparsejax.serve.replicas.cluster", cluster)
    argv = ["serve_ray.py", "some/model", "--min-replicas", "2", "--max_replicas=4", "--port=0", "--max-requests", "9"]
    monkeypatch.setattr("sys.argv", [*argv, "--sparsity", "quest"])
    assert serve_ray.main() == 0
    wanted = EngineConfig("some/model", sparsity="quest", warmup="full"), ServiceLimits(max_requests=9)
    assert calls == [(*wanted, HttpOptions(port=0), RayOptions(min_replicas=2, max_replicas=4))]
    monkeypatch.setattr("sys.argv", [*argv, "--fronts", "0"])
    assert serve_ray.main() == 2 and "fronts" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sparsejax.serve.replicas.cluster", None)
    monkeypatch.setattr("sys.argv", argv)
    assert serve_ray.main() == 2 and "sparsejax[serve,ray]" in capsys.readouterr().err
