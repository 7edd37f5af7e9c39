"""`scripts/serve_ray.py` on a real Ray cluster of this machine: two replicas, prefixes, signals, autoscaling.

Needs the extra ``ray``, which `make test-ray` installs; starting a cluster takes half a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
pytest.importorskip("ray", reason="Ray is in the extra of that name: make test-ray")
httpx2 = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")

import sparsejax.config  # noqa: E402
from sparsejax import Engine, SamplingParams  # noqa: E402
from tests.serve.live import MODEL  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ["--max-num-seqs", "4", "--max-model-len", "1024", "--warmup", "none"]
KEY = "SECRET"


@contextlib.contextmanager
def cluster(*settings: str) -> Iterator[tuple[httpx2.Client, subprocess.Popen]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "scripts/serve_ray.py", "--port", str(port), "--replica-cpus", "0.25", *ENGINE]
    command += ["--compile-cache-dir", sparsejax.config.DEFAULT_COMPILE_CACHE, "--api-key", KEY, *settings]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(command, cwd=ROOT, env=env) as process:
        try:
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120) as client:
                until(lambda: ready(client), 240)
                yield client, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx2.TransportError:
        return False


def until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def counter(client: httpx2.Client, name: str) -> dict[str, float]:
    """A counter of every replica."""
    found = re.findall(rf'^{name}{{.*replica="(\w+)".*}} (\S+)$', client.get("/metrics").text, re.M)
    return {replica: float(value) for replica, value in found}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    limits = ("--max-requests", "4", "--max-queued", "4", "--imbalance", "2")
    with cluster("--min-replicas", "2", *limits) as (client, _):
        yield client


def test_a_shared_prefix_goes_to_the_replica_that_holds_it(client):
    """Documents asked about four times each, in random order: each stays where it was read first."""
    rng = random.Random(0)
    documents = ["".join(f" {rng.choice('abcdef')}: {rng.randint(100, 999)};" for _ in range(60)) for _ in range(6)]
    where: dict[int, list[str]] = {}
    for index in rng.sample([*range(6)] * 4, 24):
        asked = {"prompt": f"{documents[index]}\nQuestion {rng.random()}:", "max_tokens": 2, "temperature": 0}
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 200
        where.setdefault(index, []).append(answer.headers["x-replica"])
    assert all(len(set(seen)) == 1 for seen in where.values()), where
    assert len({seen[0] for seen in where.values()}) == 2
    hits, tokens = counter(client, "vllm:prefix_cache_hits_total"), counter(client, "vllm:prefix_cache_queries_total")
    assert all(hits[replica] > 0.6 * tokens[replica] for replica in hits)  # three of four readings were cached


def test_answers_are_those_of_one_engine(client):
    prompts = [" box: 204; lamp: 311;\nQ:", "Ünïcødé 日本語 🎉", "Once upon a time"]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    with Engine(max_num_seqs=4, max_model_len=1024, warmup="none") as engine:
        wanted = [output.outputs[0].text for output in engine.generate(prompts, params, use_tqdm=False)]
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=KEY, max_retries=0) as other:
        asked = [dict(model=MODEL, prompt=prompt, max_tokens=12, temperature=0) for prompt in prompts]
        whole = [other.completions.create(**one).choices[0].text for one in asked]
        streamed = ["".join(c.choices[0].text for c in other.completions.create(stream=True, **one)) for one in asked]
    assert wanted == whole == streamed


def test_leaving_ends_the_request(client):
    before = sum(counter(client, "sparsejax:num_aborted_total").values())
    asked = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as answer:
        next(answer.iter_text())
    until(lambda: client.get("/load").json() == {"server_load": 0}, 20)
    assert sum(counter(client, "sparsejax:num_aborted_total").values()) == before + 1
    assert set(counter(client, "sparsejax:kv_live_pages").values()) == {0.0}


def test_what_does_not_fit_is_refused(client):
    """48 requests for 2 x 4 places and a queue of 4: every answer is whole, or a 503 that says when to come back.

    Ray counts a request as queued until a replica has taken it, so of those that come at once 4 are sure of an answer.
    """

    async def ask():
        limits = httpx2.Limits(max_connections=48)
        options = {"base_url": client.base_url, "headers": client.headers, "limits": limits, "timeout": 120}
        async with httpx2.AsyncClient(**options) as other:
            asked = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
            return await asyncio.gather(*(other.post("/v1/completions", json=asked) for _ in range(48)))

    answers = asyncio.run(ask())
    refused = [answer for answer in answers if answer.status_code == 503]
    assert 4 <= len(answers) - len(refused) < 48 and {answer.status_code for answer in answers} == {200, 503}
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded" and int(answer.headers["retry-after"]) >= 1
    until(lambda: client.get("/load").json() == {"server_load": 0}, 20)


def test_keys(client):
    assert client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401
    assert client.get("/v1/models").status_code == 200


def test_replicas_come_with_the_load_and_a_signal_drains():
    scale = ("--min-replicas", "1", "--max-replicas", "2", "--target-requests", "1", "--upscale-delay", "1")
    with cluster(*scale) as (client, process):
        assert len(client.get("/ready").json()["replicas"]) == 1
        asked = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(client.stream("POST", "/v1/completions", json=asked))
            until(lambda: len(client.get("/ready").json()["replicas"]) == 2, 120)
        asked["max_tokens"] = 300
        with client.stream("POST", "/v1/completions", json=asked) as answer:
            pieces = answer.iter_text()
            text = next(pieces)
            process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        assert '"finish_reason":"length"' in text and text.rstrip().endswith("[DONE]")
        assert process.wait(60) == 0
