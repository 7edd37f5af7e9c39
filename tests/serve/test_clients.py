"""Other people's clients as they are published, against both servers: LangChain, LiteLLM, lm-eval and the smg gateway.

They are in the extra ``clients``, which `make test-clients` installs.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients
for package in ("langchain_openai", "litellm", "lm_eval", "smg"):
    pytest.importorskip(package, reason=f"{package} is in the extra clients: make test-clients")
httpx2 = pytest.importorskip("httpx2")

import openai  # noqa: E402

from sparsejax.config import EngineConfig  # noqa: E402
from sparsejax.engine.async_engine import AsyncEngine  # noqa: E402
from sparsejax.engine.params import SamplingParams  # noqa: E402
from sparsejax.engine.request import RequestOutput  # noqa: E402
from sparsejax.models.files import EMBEDDED  # noqa: E402
from sparsejax.serve.admission import ServiceLimits  # noqa: E402
from sparsejax.serve.service import Service  # noqa: E402
from tests.engine.models import text_engine  # noqa: E402
from tests.serve.grpc_live import LiveGrpc, live_grpc, wait_for  # noqa: E402
from tests.serve.live import MODEL  # noqa: E402

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " box: 204;\nWhat is the value of box?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def wanted(client) -> str:
    """The greedy answer to `TALK`, as the openai client gets it."""
    answer = client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=12, temperature=0)
    return answer.choices[0].message.content


def test_langchain(server, wanted):
    from langchain_openai import ChatOpenAI, OpenAI

    settings = {"model": MODEL, "base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(**settings, max_tokens=12)
    answer = chat.invoke(TALK)
    assert answer.content == wanted and answer.usage_metadata["output_tokens"] <= 12
    assert "".join(chunk.content for chunk in chat.stream(TALK)) == wanted
    assert [one.content for one in chat.batch([TALK, TALK])] == [wanted] * 2
    called = ChatOpenAI(**settings, max_tokens=60).bind_tools([TOOL], tool_choice="weather").invoke(TALK)
    assert called.tool_calls[0]["name"] == "weather" and called.tool_calls[0]["args"]["city"] in ("Rome", "Oslo")
    schema = {"title": "x", **TOOL["function"]["parameters"]}
    found = ChatOpenAI(**settings, max_tokens=60).with_structured_output(schema, method="json_schema").invoke(TALK)
    assert found["city"] in ("Rome", "Oslo")
    text = OpenAI(**settings, max_tokens=5)
    assert text.invoke(" box: 204;") == "".join(text.stream(" box: 204;")) != ""
    with pytest.raises(openai.BadRequestError):
        ChatOpenAI(**settings, max_tokens=10_000).invoke(TALK)
    server.settle()


def test_litellm(server, wanted):
    import litellm

    for prefix in ("hosted_vllm", "openai"):
        asked = {"model": f"{prefix}/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "none", "messages": TALK}
        asked |= {"max_tokens": 12, "temperature": 0, "num_retries": 0}
        assert litellm.completion(**asked).choices[0].message.content == wanted
        parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
        assert "".join(parts) == wanted
        called = litellm.completion(**{**asked, "max_tokens": 200}, tools=[TOOL], tool_choice="required")
        (call,) = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(**{**asked, "model": f"{prefix}/other"})
        with pytest.raises(litellm.BadRequestError):
            litellm.completion(**{**asked, "temperature": 99})
    server.settle()


CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "204"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 8, temperature: 0, do_sample: false}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = [
    {"question": f" box: {204 + i}; lamp: 311;\\nQ: box?\\nA:", "choices": [" 204", " 311", " é"], "answer": 0}
    for i in range(5)
]


def test_lm_eval(server, tmp_path):
    """The program itself, on tasks of ours; its scores and texts are the engine's."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    settings = f"model={MODEL},base_url={server.url}/v1/completions,tokenizer={EMBEDDED},num_concurrent=4,max_retries=1"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", settings]
    command += ["--tasks", "choice,write", "--include_path", str(tmp_path)]
    command += ["--log_samples", "--output_path", str(tmp_path)]
    no_network = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env = {**os.environ, **no_network, "OPENAI_API_KEY": "none", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {
        name: [json.loads(line) for path in tmp_path.rglob(f"samples_{name}_*.jsonl") for line in path.open()]
        for name in ("choice", "write")
    }
    for sample in samples["choice"]:
        question = sample["doc"]["question"]
        for choice, ((score, greedy),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            wanted, is_greedy = scored(server, question, choice)
            assert float(score) == pytest.approx(wanted, abs=1e-3) and (str(greedy) == "True") == is_greedy
    for sample in samples["write"]:
        params = SamplingParams(temperature=0.0, max_tokens=8, stop=["\n", "e"], output_kind="FINAL_ONLY")
        assert sample["resps"][0][0] == offline(server, ids(server, sample["doc"]["question"]), params).outputs[0].text
    assert len(samples["choice"]) == len(samples["write"]) == len(QUESTIONS)
    server.settle()


def ids(server, text: str) -> list[int]:
    """Tokens as lm-eval sends them: without special ones."""
    return server.service.engine.engine.tokenizer.encode(text, add_special_tokens=False)


def offline(server, prompt: list[int], params: SamplingParams) -> RequestOutput:
    async def run() -> RequestOutput:
        return [output async for output in server.service.engine.generate(prompt, params)][-1]

    return asyncio.run(run())


def scored(server, context: str, choice: str) -> tuple[float, bool]:
    """Log-probability of a continuation, and whether it is the greedy one, by the engine."""
    whole, start = ids(server, context + choice), len(ids(server, context))
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, output_kind="FINAL_ONLY")
    entries = offline(server, whole, params).prompt_logprobs
    read = [entries[place][whole[place]] for place in range(start, len(whole))]
    return math.fsum(one.logprob for one in read), all(one.rank == 1 for one in read)


@contextlib.contextmanager
def gateway(live: LiveGrpc, *settings: str) -> Iterator[httpx2.Client]:
    """smg in front of a gRPC server, once it knows the model."""
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(str(free.getsockname()[1]))
    command = [str(Path(sys.executable).parent / "smg"), "launch"]
    command += ["--worker-urls", f"grpc://127.0.0.1:{live.server.port}"]
    command += ["--model-path", str(EMBEDDED), "--host", "127.0.0.1", "--port", ports[0], "--prometheus-port", ports[1]]
    with subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=60) as client:
                wait_for(lambda: knows_the_model(client), 60)
                yield client
        finally:
            process.terminate()


def knows_the_model(client: httpx2.Client) -> bool:
    """A model is listed a moment before requests reach it."""
    try:
        asked = {"model": MODEL, "messages": TALK, "max_tokens": 1}
        return client.post("/v1/chat/completions", json=asked).status_code == 200
    except httpx2.TransportError:
        return False


def small_service(limits: ServiceLimits | None = None) -> Service:
    return Service(EngineConfig(page_size=16), limits, load=lambda: AsyncEngine(engine=text_engine(warmup="none")))


def test_smg(wanted):
    """Chat, streams, completions, stop strings, and a client that leaves: an abort at the gateway is one here."""
    with live_grpc(small_service()) as live, gateway(live) as http:
        url = f"{http.base_url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            asked = {"model": MODEL, "messages": TALK, "max_tokens": 12, "temperature": 0}
            whole = client.chat.completions.create(**asked)
            assert whole.choices[0].message.content.strip() == wanted.strip()
            assert whole.usage.completion_tokens <= 12 and whole.choices[0].finish_reason in ("stop", "length")
            stream = client.chat.completions.create(**asked, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
            text = client.completions.create(model=MODEL, prompt=" box:", max_tokens=20, temperature=0).choices[0].text
            stop = text[len(text) // 2]
            cut = client.completions.create(model=MODEL, prompt=" box:", max_tokens=20, temperature=0, stop=stop)
            assert cut.choices[0].text == text[: text.index(stop)]
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(**{**asked, "model": "other"})
            live.settle()
            aborted = live.service.stats()["num_aborted"]
            stream = client.chat.completions.create(
                **{**asked, "max_tokens": 700}, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            stream.close()
            wait_for(lambda: live.service.stats()["num_aborted"] > aborted)
            live.settle()


def test_smg_passes_refusals_on():
    """RESOURCE_EXHAUSTED is 429 for the gateway's clients, UNAVAILABLE is 503."""
    plain = ("--disable-retries", "--disable-circuit-breaker", "--disable-health-check")
    with live_grpc(small_service(ServiceLimits(max_requests=1))) as live, gateway(live, *plain) as http:
        asked = {"model": MODEL, "messages": TALK, "max_tokens": 4}
        with live.client() as client:
            held = client.stream([1, 2, 3], {"max_tokens": 700, "ignore_eos": True})
            next(held)
            full = http.post("/v1/chat/completions", json=asked)
            assert full.status_code == 429, full.text
            held.close()
        wait_for(lambda: live.service.admission.requests == 0)
        assert http.post("/v1/chat/completions", json=asked).status_code == 200
        live.loop.call_soon_threadsafe(lambda: live.loop.create_task(live.service.drain(1.0)))
        wait_for(lambda: live.service.status.value == "draining")
        draining = http.post("/v1/chat/completions", json=asked)
        assert draining.status_code == 503, draining.text


def test_versions_are_those_that_were_tried():
    """What runs here is what constraints.txt pins."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M))
    for name in ("langchain-openai", "litellm", "lm_eval", "smg"):
        assert importlib.metadata.version(name) == pins[name]
