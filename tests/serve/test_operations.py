"""What operators see: probes that tell the truth, metrics, logs without prompts, an orderly end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from sparsejax.config import EngineConfig
from sparsejax.engine.async_engine import AsyncEngine
from sparsejax.engine.params import SamplingParams
from sparsejax.errors import ConfigError, ModelError
from sparsejax.serve.logs import JsonFormatter
from sparsejax.serve.metrics import Metrics
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.openai.server import listen
from sparsejax.serve.service import Service
from sparsejax.sparsity.eviction import Keep
from sparsejax.sparsity.policy import SparsityConfig
from tests.engine.models import tiny_engine
from tests.serve.live import MODEL, live


def metric(text: str, name: str) -> float:
    return float(re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M)[1])


def test_probes_follow_the_service(server, monkeypatch):
    release = threading.Event()

    def load() -> AsyncEngine:
        release.wait(20)
        return server.service.engine

    service = Service(server.service.config, load=load)
    seen = {}

    def watch() -> None:
        url = f"http://127.0.0.1:{port}"
        while "loading" not in seen:
            try:
                ready, health = httpx2.get(f"{url}/ready"), httpx2.get(f"{url}/health")
                refused = httpx2.post(f"{url}/v1/completions", json={"prompt": "x"})
            except httpx2.TransportError:
                continue
            seen["loading"] = ready.json()["status"], ready.status_code, health.status_code, refused.status_code
            seen["retry"] = refused.headers["retry-after"]
        release.set()

    with listen(HttpOptions(port=0)) as probe:
        port = probe.getsockname()[1]
    watcher = threading.Thread(target=watch)
    watcher.start()
    with live(service, HttpOptions(port=port), stop=False) as later:
        watcher.join()
        assert seen["loading"] == ("loading", 503, 200, 503) and int(seen["retry"]) >= 1
        with later.http() as http:
            assert [http.get(path).status_code for path in ("/ready", "/health", "/ping", "/load")] == [200] * 4
            monkeypatch.setattr(service.engine, "failure", RuntimeError("broken"))
            assert [http.get(path).status_code for path in ("/ready", "/health", "/metrics")] == [503, 503, 200]
            assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
            monkeypatch.undo()


def test_metrics_count_what_was_done(server, http):
    before = http.get("/metrics").text
    body = {"prompt": " box: 204;", "max_tokens": 7, "ignore_eos": True, "n": 2, "seed": 1}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert http.post("/v1/completions", json={**body, "top_p": 7}).status_code == 400
    after = http.get("/metrics")
    assert after.headers["content-type"].startswith("text/plain")
    tokens = len(http.post("/tokenize", json={"prompt": " box: 204;"}).json()["tokens"])
    for name, grown in (
        ("sparsejax:num_requests_total", 1),
        ("vllm:prompt_tokens_total", tokens),
        ("vllm:generation_tokens_total", 14),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("sparsejax:inter_token_latency_seconds_count", 12),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:request_queue_time_seconds_count", 1),
    ):
        assert metric(after.text, name) - metric(before, name) == grown, name
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert metric(after.text, name) == 0
    assert metric(after.text, "sparsejax:compiles_after_warmup_total") == 0
    for name in ("sparsejax:budget_cap_ratio", "sparsejax:recall_fallback_ratio"):
        assert metric(after.text, name) == 0, "no list of a top_p, no check of recall"
    assert metric(after.text, "vllm:num_preemptions_total") >= 0
    assert 'sparsejax:http_requests_total{route="/v1/completions",status="400"}' in after.text
    assert 'sparsejax:status{status="ready"} 1.0' in after.text
    assert 'vllm:cache_config_info{block_size="16"' in after.text.replace('engine="0",', "").replace(
        f'model_name="{MODEL}",', ""
    )
    opened = http.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert opened.headers["content-type"].startswith("application/openmetrics-text") and opened.text.endswith("# EOF\n")


def test_metrics_tell_codecs_tiers_and_prefix_hits():
    """Bytes in use by codec and tier while a request runs, and the tokens that a second one found in the cache."""
    tiers = dict(host_kv_bytes=1 << 20, enable_prefix_caching=True)
    load = lambda: AsyncEngine(engine=tiny_engine(sparsity="int8", **tiers))  # noqa: E731
    prompt, service = list(range(40)), Service(EngineConfig(page_size=16), load=load)
    metrics = Metrics(service, "tiny")

    async def run() -> tuple[str, str]:
        service.start()
        await service.loaded()
        asked = {"temperature": 0.0, "max_tokens": 50, "ignore_eos": True, "output_kind": "DELTA"}
        async with await service.submit(prompt, SamplingParams(**asked)) as stream:
            await anext(aiter(stream))
            during = metrics.render()[0].decode()
        await (await service.submit(prompt, SamplingParams(**{**asked, "max_tokens": 2}))).final()
        after = metrics.render()[0].decode()
        await service.stop()
        return during, after

    during, after = asyncio.run(run())
    held = metric(during, "sparsejax:kv_page_bytes") * metric(during, "sparsejax:kv_live_pages")
    assert labelled(during, "kv_codec_bytes") == {"int8": held} and held > 0
    tiers = labelled(during, "kv_tier_bytes")
    assert set(tiers) == {"device", "host"} and tiers["device"] > held  # its open page counts too
    assert labelled(after, "kv_codec_bytes") == {"int8": 0.0}
    for name in ("vllm", "sparsejax"):
        assert metric(after, f"{name}:prefix_cache_hits_total") == 32  # whole pages of the prompt
        assert metric(after, f"{name}:prefix_cache_queries_total") == 80


def test_metrics_tell_what_policies_hold_and_read():
    """Of 200 tokens 96 stay, and 3 pages of 16 are read of 7: sink, recents and nothing else."""
    keep = Keep("keydiff", budget=96, recent=16)
    policy = SparsityConfig(keep=keep, select="quest", budget=48, sink=16, recent=16, recall_every=4)
    engine = tiny_engine(sparsity=policy)
    service = Service(EngineConfig(page_size=16), load=lambda: AsyncEngine(engine=engine))
    metrics = Metrics(service, "tiny")

    async def run() -> tuple[str, str]:
        service.start()
        await service.loaded()
        before = metrics.render()[0].decode()
        asked = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
        await (await service.submit(list(range(50)) * 4, asked)).final()
        after = metrics.render()[0].decode()
        await service.stop()
        return before, after

    before, after = asyncio.run(run())
    ratios = ("sparse_read_ratio", "sparse_held_ratio")
    assert [metric(before, f"sparsejax:{name}") for name in ratios] == [1, 1]
    assert [metric(after, f"sparsejax:{name}") for name in ratios] == pytest.approx([3 / 7, 7 / 13])
    assert metric(after, "sparsejax:pages_read_per_step") == 3
    assert metric(after, "sparsejax:decode_pages_held_total") == 8 * 7
    assert metric(after, "sparsejax:recall_checks_total") == 2
    assert all(0 < metric(after, f"sparsejax:recall_layer_{layer}") < 1 for layer in range(2))


def labelled(text: str, name: str) -> dict[str, float]:
    """Values of a metric by its last label."""
    found = re.findall(rf'^sparsejax:{name}{{.*?(?:codec|tier)="(\w+)".*}} (\S+)$', text, re.M)
    return {label: float(value) for label, value in found}


def test_logs_name_requests_and_never_prompts(server, http, caplog):
    secret = "mellifluous"
    with caplog.at_level(logging.INFO, logger="sparsejax"):
        http.post(
            "/v1/completions",
            json={"prompt": secret, "max_tokens": 2, "surprise": secret},
            headers={"x-request-id": "my-id-7"},
        )
        http.post("/v1/completions", json={"prompt": [secret]})
        http.post("/v1/completions", json={"prompt": "x", "guided_regex": f"({secret}"})
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.startswith("sparsejax")]
    assert all(json.loads(line) and secret not in line for line in lines)
    (line,) = [json.loads(line) for line in lines if "my-id-7" in line]
    assert line["route"] == "/v1/completions" and line["status"] == 200 and line["completion_tokens"] == 2
    assert line["ms"] > 0 and line["first_token_ms"] > 0 and line["finish"] == ["length"] and line["call"]
    assert http.get("/version", headers={"x-request-id": "my-id-8"}).headers["x-request-id"] == "my-id-8"


def test_a_port_in_use_and_a_missing_model_are_one_clear_error():
    with listen(HttpOptions(port=0)) as taken, pytest.raises(ConfigError, match="cannot listen"):
        listen(HttpOptions(port=taken.getsockname()[1]))

    def load() -> AsyncEngine:
        raise ModelError("nothing there")

    with pytest.raises(ModelError, match="nothing there"), live(Service(EngineConfig(), load=load)):
        pass


@pytest.mark.parametrize(("signals", "status"), [(1, 0), pytest.param(2, 130, marks=pytest.mark.slow)])
def test_signals(signals, status):
    """SIGTERM lets a running answer finish; a second one ends the process at once."""
    program = (
        "from tests.engine.models import text_engine\n"
        "from sparsejax.config import EngineConfig\n"
        "from sparsejax.engine.async_engine import AsyncEngine\n"
        "from sparsejax.serve.openai.options import HttpOptions\n"
        "from sparsejax.serve.openai.server import run\n"
        "from sparsejax.serve.service import Service\n"
        "load = lambda: AsyncEngine(engine=text_engine(warmup='none'))\n"
        "run(Service(EngineConfig(), load=load), HttpOptions(port=0))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if '"ready"' in line:
                break
        url = "http://" + json.loads(line)["address"]
        body = {"prompt": "x", "max_tokens": 700, "ignore_eos": True, "stream": True, "temperature": 0}
        received = ""
        try:
            with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
                for part in answer.iter_text():
                    if not received:
                        for _ in range(signals):
                            os.kill(process.pid, signal.SIGTERM)
                            time.sleep(0.05)
                        if signals == 1:
                            assert httpx2.get(f"{url}/ready").status_code == 503
                            assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 503
                    received += part
        except httpx2.TransportError:
            assert signals == 2
        assert process.wait(20) == status
        assert (signals == 1) == received.rstrip().endswith("[DONE]")
        if signals == 1:
            assert '"finish_reason":"length"' in received
    finally:
        process.kill()
        process.stderr.close()
