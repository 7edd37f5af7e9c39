"""Every call of the gRPC server through its client, against what the engine says."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("grpc_health")
pytest.importorskip("grpc_reflection")

import grpc  # noqa: E402
from google.protobuf.descriptor_pool import DescriptorPool  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (  # noqa: E402
    ProtoReflectionDescriptorDatabase,
)

from sparsejax import SamplingParams  # noqa: E402
from sparsejax.config import EngineConfig  # noqa: E402
from sparsejax.engine.async_engine import AsyncEngine  # noqa: E402
from sparsejax.errors import RequestError, SparseJaxError  # noqa: E402
from sparsejax.serve.admission import ServiceLimits  # noqa: E402
from sparsejax.serve.errors import Overloaded, Unavailable  # noqa: E402
from sparsejax.serve.grpc.options import GrpcOptions  # noqa: E402
from sparsejax.serve.grpc.protos import control_pb2  # noqa: E402
from sparsejax.serve.grpc.protos import inference_pb2 as pb  # noqa: E402
from sparsejax.serve.service import Service  # noqa: E402
from tests.engine.models import text_engine, tiny_engine  # noqa: E402
from tests.serve.grpc_live import live_grpc, wait_for  # noqa: E402
from tests.serve.tiny import tiny_service  # noqa: E402

LONG = {"max_tokens": 400, "ignore_eos": True, "temperature": 0.0}
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def live():
    service = Service(
        EngineConfig(page_size=16), ServiceLimits(max_requests=8), load=lambda: AsyncEngine(engine=text_engine())
    )
    with live_grpc(service, GrpcOptions(port=0, max_message_bytes=1 << 20)) as running:
        yield running
        running.settle()


@pytest.fixture
def client(live):
    with live.client() as one:
        yield one
    live.settle()


@pytest.fixture(scope="module")
def engine():
    with text_engine() as one:
        yield one


def gathered(pieces) -> tuple[dict[int, str], dict[int, list[int]], dict[int, tuple]]:
    """Text, tokens and ends by sample of a stream's pieces."""
    texts, tokens, ends = {}, {}, {}
    for piece in pieces:
        for part in piece.outputs:
            texts[part.index] = texts.get(part.index, "") + part.text
            tokens.setdefault(part.index, []).extend(part.token_ids)
            if part.finished():
                ends[part.index] = (part.finish_reason, part.stop_reason)
    return texts, tokens, ends


def status(failed) -> grpc.StatusCode:
    return failed.value.__cause__.code()


def test_an_answer_is_the_engines(client, engine):
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    wanted = engine.generate(["Hello, wörld"], params, use_tqdm=False)[0]
    given = client.generate("Hello, wörld", params, request_id="mine", return_prompt=True)
    assert given.request_id == "mine" and given.finished
    assert given.prompt_token_ids == wanted.prompt_token_ids
    assert given.outputs == wanted.outputs
    assert given.prompt_logprobs == wanted.prompt_logprobs
    assert client.generate(wanted.prompt_token_ids, params).outputs == wanted.outputs


def test_what_is_not_set_has_its_default(client):
    given = client.generate("abc")
    assert len(given.outputs) == 1 and len(given.outputs[0].token_ids) <= 16
    assert given.prompt_token_ids is None and given.outputs[0].logprobs is None
    seeded = {"seed": 5, "max_tokens": 12}
    assert client.generate("abc", seeded).outputs == client.generate("abc", {**seeded, "temperature": 1.0}).outputs


def test_a_stream_gives_the_whole_text(client):
    draw = random.Random(7)
    for trial in range(40):
        prompt = "".join(draw.choices("abc é漢🙂\n", k=draw.randint(1, 30)))
        params = {"seed": trial, "max_tokens": draw.randint(1, 40), "n": draw.choice([1, 1, 3]), "temperature": 1.3}
        if draw.random() < 0.6:
            params["stop"] = draw.choices(["e", "th", "a", "\n", " "], k=2)
        whole = client.generate(prompt, params)
        texts, tokens, ends = gathered(client.stream(prompt, params))
        for part in whole.outputs:
            assert texts[part.index] == part.text, (prompt, params)
            assert tokens[part.index] == part.token_ids
            assert ends[part.index] == (part.finish_reason, part.stop_reason)


def test_usage_comes_last_and_the_prompt_first(live):
    with live.channel() as channel:
        stream = channel.unary_stream(
            "/sparsejax.v1.Inference/GenerateStream",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        sampling = pb.SamplingParams(max_tokens=5, ignore_eos=True)
        call = stream(pb.GenerateRequest(text="abcd", sampling=sampling, return_prompt=True))
        messages = list(call)
    assert [m.HasField("prompt") for m in messages] == [True] + [False] * (len(messages) - 1)
    assert [m.HasField("usage") for m in messages] == [False] * (len(messages) - 1) + [True]
    usage = messages[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(messages[0].prompt.token_ids), 5)
    assert dict(call.initial_metadata())["x-request-id"]


def test_conversations(client, engine):
    params = {"temperature": 0.0, "max_tokens": 12}
    if not engine.tokenizer.chat_template:
        with pytest.raises(RequestError, match="chat template"):
            client.chat(MESSAGES, params)
        return
    wanted = engine.chat(MESSAGES, SamplingParams(**params), use_tqdm=False)[0].outputs
    assert client.chat(MESSAGES, params).outputs == wanted
    assert gathered(client.chat_stream(MESSAGES, params))[0] == {0: wanted[0].text}
    with pytest.raises(RequestError, match="tools"):
        client.chat(MESSAGES, params, tools="{not json")
    with pytest.raises(RequestError, match="messages"):
        client.chat([], params)


def test_tokens_there_and_back(client, engine):
    ids = client.tokenize("naïve 🙂", add_special_tokens=False)
    assert ids == engine.tokenizer.encode("naïve 🙂", add_special_tokens=False)
    assert client.detokenize(ids) == "naïve 🙂"
    with pytest.raises(RequestError, match="vocabulary"):
        client.detokenize([10**6])


def test_control(client, live, engine):
    model, server = client.model_info(), client.server_info()
    assert (model.vocab_size, model.max_model_len) == (len(engine.tokenizer), engine.max_model_len)
    assert (model.family, list(model.eos_token_ids)) == ("llama", [engine.tokenizer.eos_token_id])
    assert server.status == control_pb2.SERVER_STATUS_READY and server.alive and server.max_requests == 8
    memory = client.memory()
    assert sum(memory.values()) == 2 * memory["total"] and memory == live.service.memory()
    assert client.stats()["kv_free_pages"] == live.service.stats()["kv_free_pages"]


def test_abort_ends_a_stream(client, live):
    pieces = client.stream("abc", LONG, request_id="to-abort")
    next(pieces)
    client.abort("to-abort", "unknown")
    assert gathered(pieces)[2] == {0: ("abort", None)}


def test_leaving_and_deadlines_free_the_pages(live, client):
    streams = [client.stream("abc" * 10, LONG) for _ in range(4)]
    for stream in streams:
        next(stream)
        assert live.service.admission.requests
        stream.close()
    live.settle()
    before = live.service.stats()["num_aborted"]
    with live.client(timeout=0.15) as hurried, pytest.raises(TimeoutError):
        for _ in range(50):
            hurried.generate("abc" * 10, {**LONG, "max_tokens": 700})
    live.settle()
    assert live.service.stats()["num_aborted"] == before + 1


def test_a_client_that_vanishes_frees_its_pages(live):
    with live.client() as gone:
        pieces = gone.stream("abc", {**LONG, "max_tokens": 700})
        next(pieces)
        gone.close()  # the connection breaks while the request runs
        with pytest.raises(SparseJaxError, match="CANCELLED"):
            list(pieces)
    live.settle()


def test_a_full_queue(live, client):
    streams = [client.stream("abc", {**LONG, "max_tokens": 700}) for _ in range(8)]
    readers = [threading.Thread(target=next, args=(stream,)) for stream in streams]
    for reader in readers:
        reader.start()
    wait_for(lambda: live.service.admission.requests == 8)
    with pytest.raises(Overloaded, match="busy") as failed:
        client.generate("abc")
    assert status(failed) is grpc.StatusCode.RESOURCE_EXHAUSTED and failed.value.retry_after >= 1
    metadata = dict(failed.value.__cause__.trailing_metadata())
    assert int(metadata["grpc-retry-pushback-ms"]) >= 1000 and int(metadata["retry-after"]) >= 1
    for reader in readers:
        reader.join()
    for stream in streams:
        stream.close()


def test_a_full_queue_refuses_before_it_reads(live, client):
    """Messages that cannot even be read are refused as too many, once each; what takes no room is still answered."""
    service, refused = live.service, live.service.rejected["overloaded"]
    tickets = [service.admission.take(1) for _ in range(service.limits.max_requests)]
    methods = ("Inference/Generate", "Inference/GenerateStream", "Inference/Chat", "Inference/ChatStream")
    with live.channel() as channel:
        for method in methods:
            with pytest.raises(grpc.RpcError) as failed:
                list(channel.unary_stream(f"/sparsejax.v1.{method}")(b"\xff" * 100, timeout=30))
            assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert service.rejected["overloaded"] == refused + len(methods)
    assert client.tokenize("abc") and client.server_info().admitted_requests == len(tickets)
    for ticket in tickets:
        ticket.release()
    assert client.generate("abc").finished


def test_salts_keep_tenants_apart(live, client):
    """The same prompt under two salts meets no page of the other's; under the same salt it finds its own."""
    prompt = [7 + place % 50 for place in range(60)]
    seen = []
    for salt in ("one", "two", None, "one"):
        hits = live.service.stats()["prefix_cache_hits"]
        output = client.generate(prompt, {"max_tokens": 2, "ignore_eos": True, "cache_salt": salt})
        assert output.num_cached_tokens == live.service.stats()["prefix_cache_hits"] - hits
        seen.append(output.num_cached_tokens)
    assert seen == [0, 0, 0, 48]  # whole pages of the prompt
    with pytest.raises(RequestError, match="cache_salt") as failed:
        client.generate(prompt, {"cache_salt": ""})
    assert status(failed) is grpc.StatusCode.INVALID_ARGUMENT and failed.value.parameter == "cache_salt"


BAD = [
    ({"temperature": -1.0}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**62, "min_tokens": -1}, "min_tokens"),
    ({"logprobs": 99}, "logprobs"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"stop_token_ids": [-4]}, "stop_token_ids"),
    ({"logit_bias": {10**9: 1.0}}, "logit_bias"),
    ({"sparsity": "{oops"}, "sparsity"),
    ({"sparsity": "no-such-preset"}, "sparsity"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty"),
]


@pytest.mark.parametrize(("params", "field"), BAD)
def test_bad_values_name_their_field(client, params, field):
    message = None
    if field == "structured_outputs":
        message = pb.SamplingParams(structured_outputs=pb.StructuredOutputs())
    with pytest.raises(RequestError) as failed:
        if message is None:
            client.generate("abc", params)
        else:
            client._send(client._inference.Generate, pb.GenerateRequest(text="abc", sampling=message))
    assert status(failed) is grpc.StatusCode.INVALID_ARGUMENT
    assert failed.value.parameter == field and field in str(failed.value)


def test_bad_requests(client):
    for request, wanted in (
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="a", model="other"), grpc.StatusCode.NOT_FOUND),
        (pb.GenerateRequest(text="a", request_id=""), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="a", request_id="x" * 300), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="a b " * 2000), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(RequestError) as failed:
            client._send(client._inference.Generate, request)
        assert status(failed) is wanted
    with pytest.raises(RequestError, match="no_such"):
        client.generate("a", {"no_such": 1})
    with pytest.raises(RequestError, match="temperature"):
        client.generate("a", {"temperature": "hot"})
    with pytest.raises(RequestError):
        client.generate([-5])
    first = client.stream("abc", LONG, request_id="same")
    next(first)
    with pytest.raises(RequestError, match="in use") as failed:
        client.generate("abc", request_id="same")
    assert status(failed) is grpc.StatusCode.ALREADY_EXISTS
    first.close()


def test_broken_messages_change_nothing(live, client):
    wanted = client.generate("abc", {"seed": 1}).outputs
    sampling = pb.SamplingParams(max_tokens=2, stop=["x", "yy"])
    whole = pb.GenerateRequest(text="abc" * 9, sampling=sampling).SerializeToString()
    draw = random.Random(3)
    allowed = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    seen = set()
    with live.channel() as channel:
        for method in ("Inference/Generate", "Inference/GenerateStream", "Inference/Chat", "Control/GetStats"):
            send = channel.unary_stream(f"/sparsejax.v1.{method}")
            cuts = [whole[:cut] for cut in range(0, len(whole), 3)]
            noise = [draw.randbytes(draw.randint(1, 60)) for _ in range(25)]
            for data in cuts + noise:
                try:
                    list(send(data, timeout=30))
                except grpc.RpcError as error:
                    seen.add(error.code())
    assert seen <= allowed and grpc.StatusCode.INVALID_ARGUMENT in seen
    assert client.generate("abc", {"seed": 1}).outputs == wanted


def test_calls_without_a_message_are_no_silence():
    """Half-closed before a message, or never closed and never sent: a status each, in time."""
    never = threading.Event()

    def silent():
        never.wait(20)
        yield b""

    with live_grpc(tiny_service(), GrpcOptions(port=0, message_timeout=0.2)) as live, live.channel() as channel:
        for method in ("Inference/Generate", "Inference/GenerateStream", "Control/GetStats"):
            send = channel.stream_stream(f"/sparsejax.v1.{method}")
            for messages, wanted in ((iter([]), "INVALID_ARGUMENT"), (silent(), "DEADLINE_EXCEEDED")):
                with pytest.raises(grpc.RpcError) as failed:
                    list(send(messages, timeout=20))
                assert failed.value.code().name == wanted and "message" in failed.value.details()
        never.set()
        with live.client() as client:
            assert client.generate([1, 2, 3]).finished


def test_messages_have_a_size_limit(client):
    with pytest.raises(Overloaded, match="larger than max"):
        client.generate("a" * (2 << 20))
    assert client.generate("a").finished


def test_reflection_lists_every_service(live):
    with live.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        listed = set(database.get_services())
        pool = DescriptorPool(database)
        methods = {m.name for m in pool.FindServiceByName("sparsejax.v1.Inference").methods}
        fields = pool.FindMessageTypeByName("sparsejax.v1.SamplingParams").fields
    assert {"sparsejax.v1.Inference", "sparsejax.v1.Control", "grpc.health.v1.Health"} <= listed
    assert set(live.server.services) <= listed
    assert methods == {"Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "Detokenize", "Abort"}
    assert all(field.has_presence or field.is_repeated for field in fields)


def test_statuses_from_loading_to_the_end():
    release = threading.Event()

    def load() -> AsyncEngine:
        release.wait(20)
        return AsyncEngine(engine=tiny_engine())

    service = Service(EngineConfig(), load=load)
    with live_grpc(service, GrpcOptions(port=0), loaded=False) as running, running.client() as client:
        assert not client.ready() and client.server_info().status == control_pb2.SERVER_STATUS_LOADING
        for call in (lambda: client.generate([1, 2]), client.model_info, client.stats, lambda: client.tokenize("a")):
            with pytest.raises(Unavailable, match="loading") as failed:
                call()
            assert status(failed) is grpc.StatusCode.UNAVAILABLE
        health = health_pb2_grpc.HealthStub(client.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="sparsejax.v1.Inference"), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        release.set()
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert client.ready("sparsejax.v1.Control")
        with pytest.raises(RequestError, match="tokenizer"):
            client.generate("text")
        pieces = client.stream([1, 2, 3], LONG)
        next(pieces)
        draining = asyncio.run_coroutine_threadsafe(service.drain(30), running.loop)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable, match="draining"):
            client.generate([1, 2])
        assert gathered(pieces)[2] == {0: ("length", None)}
        assert draining.result(30)


def test_the_protos_and_the_generated_modules_agree():
    folder = Path(pb.__file__).parent
    for module in (pb, control_pb2):
        text = (folder / f"{Path(module.__file__).stem.removesuffix('_pb2')}.proto").read_text()
        text = re.sub(r"//.*", "", text)
        found = {
            (name, field, int(number))
            for name, body in re.findall(r"message (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text)
            for field, number in re.findall(r"(\w+) = (\d+);", body)
        }
        known = {
            (name, field.name, field.number)
            for name, message in module.DESCRIPTOR.message_types_by_name.items()
            for field in message.fields
        }
        assert found == known and len(known) >= 17
        for service in module.DESCRIPTOR.services_by_name.values():
            assert {m.name for m in service.methods} == set(re.findall(r"rpc (\w+)", text))


def test_a_slow_reader_does_not_stop_others(live, client):
    lazy = client.stream("abc", LONG)
    next(lazy)
    start = time.monotonic()
    assert client.generate("abc", {"max_tokens": 4}).finished
    assert time.monotonic() - start < 20
    lazy.close()
