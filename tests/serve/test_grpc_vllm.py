"""vLLM's engine service through its published stubs, as a gateway uses it."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("grpc_health")
pytest.importorskip("grpc_reflection")
pytest.importorskip("smg_grpc_proto")

import grpc  # noqa: E402
from smg_grpc_proto import vllm_engine_pb2 as pb  # noqa: E402
from smg_grpc_proto import vllm_engine_pb2_grpc  # noqa: E402
from smg_grpc_proto.generated import common_pb2  # noqa: E402

from sparsejax import SamplingParams  # noqa: E402
from sparsejax.config import EngineConfig  # noqa: E402
from sparsejax.engine.async_engine import AsyncEngine  # noqa: E402
from sparsejax.serve.grpc.options import GrpcOptions  # noqa: E402
from sparsejax.serve.service import Service  # noqa: E402
from tests.engine.models import text_engine  # noqa: E402
from tests.serve.grpc_live import live_grpc  # noqa: E402
from tests.serve.tiny import tiny_service  # noqa: E402

IDS = [12, 5, 33, 8]
NAME = "vllm.grpc.engine.VllmEngine"


@pytest.fixture(scope="module")
def live():
    service = Service(EngineConfig(page_size=16), load=lambda: AsyncEngine(engine=text_engine()))
    with live_grpc(service, GrpcOptions(port=0, served_model_name=("small",))) as running:
        yield running


@pytest.fixture
def stub(live):
    with live.channel() as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)
    live.settle()


@pytest.fixture(scope="module")
def wanted():
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    with text_engine() as engine:
        return engine.generate([IDS], params, use_tqdm=False)[0]


def request(stream: bool, **sampling) -> object:
    defaults = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    return pb.GenerateRequest(
        request_id="gateway-1",
        tokenized=pb.TokenizedInput(input_ids=IDS),
        sampling_params=pb.SamplingParams(**{**defaults, **sampling}),
        stream=stream,
    )


def test_tokens_in_and_out(stub, wanted):
    (answer,) = stub.Generate(request(False, logprobs=1, prompt_logprobs=0), timeout=60)
    done, part = answer.complete, wanted.outputs[0]
    assert list(done.output_ids) == part.token_ids
    assert (done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("length", len(IDS), 12)
    chosen = [entry[token].logprob for token, entry in zip(part.token_ids, part.logprobs, strict=True)]
    assert list(done.output_logprobs.token_logprobs) == pytest.approx(chosen)
    given = done.input_logprobs
    assert list(given.token_ids) == IDS and not given.token_logprobs[0].HasField("value")
    read = [entry[token].logprob for token, entry in zip(IDS[1:], wanted.prompt_logprobs[1:], strict=True)]
    assert [one.value for one in given.token_logprobs[1:]] == pytest.approx(read)


def test_chunks_then_the_end(stub, wanted):
    answers = list(stub.Generate(request(True), timeout=60))
    tokens = [token for answer in answers[:-1] for token in answer.chunk.token_ids]
    assert tokens == wanted.outputs[0].token_ids == list(answers[-1].complete.output_ids)


def test_samples_have_their_own_ends(stub):
    answers = list(stub.Generate(request(True, n=3, temperature=1.0, seed=4), timeout=60))
    ends = {a.complete.index: list(a.complete.output_ids) for a in answers if a.WhichOneof("response") == "complete"}
    assert sorted(ends) == [0, 1, 2]
    for index, tokens in ends.items():
        chunks = [a.chunk for a in answers if a.WhichOneof("response") == "chunk" and a.chunk.index == index]
        assert [token for chunk in chunks for token in chunk.token_ids] == tokens


def test_a_stop_token_is_named(stub, wanted):
    stop = wanted.outputs[0].token_ids[3]
    (answer,) = stub.Generate(request(False, stop_token_ids=[stop]), timeout=60)
    assert (answer.complete.finish_reason, answer.complete.matched_token_id) == ("stop", stop)


def test_abort_by_its_own_call(stub, live):
    call = stub.Generate(request(True, max_tokens=700), timeout=60)
    next(call)
    stub.Abort(pb.AbortRequest(request_ids=["gateway-1"]), timeout=60)
    assert list(call)[-1].complete.finish_reason == "abort"


def test_what_gateways_ask_first(stub, live):
    assert stub.HealthCheck(pb.HealthCheckRequest()).healthy
    model = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.served_model_name, model.is_generation, model.max_context_length) == ("small", True, 1024)
    assert model.vocab_size and list(model.eos_token_ids)
    server = stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.server_type, server.block_size) == ("vllm-grpc", 16)
    (load,) = stub.GetLoads(pb.GetLoadsRequest()).loads
    assert (load.num_total_reqs, load.num_used_tokens, load.token_usage) == (0, 0, 0.0)
    assert load.max_total_num_tokens == 16 * live.service.stats()["kv_free_pages"]


def test_what_is_not_offered_says_so(stub):
    unimplemented = grpc.StatusCode.UNIMPLEMENTED
    for call, code in (
        (lambda: stub.Embed(pb.EmbedRequest()), unimplemented),
        (lambda: list(stub.GetTokenizer(common_pb2.GetTokenizerRequest())), unimplemented),
        (lambda: list(stub.Generate(pb.GenerateRequest())), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda: list(stub.Generate(request(False, structural_tag="x"))), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda: list(stub.Generate(request(False, truncate_prompt_tokens=2))), grpc.StatusCode.INVALID_ARGUMENT),
        (lambda: list(stub.Generate(request(False, logprobs=-1))), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as failed:
            call()
        assert failed.value.code() is code, failed.value
        assert bool(failed.value.initial_metadata()) is (code is not unimplemented)


def test_without_the_package_the_rest_is_served(monkeypatch, caplog):
    for name in ("smg_grpc_proto", "sparsejax.serve.grpc.vllm"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sparsejax.serve.grpc.vllm")
    with live_grpc(tiny_service(), GrpcOptions(port=0)) as live, live.client() as client:
        assert NAME not in client.server_info().services
        assert client.generate([1, 2, 3]).finished
    assert "smg-grpc-proto" in caplog.text
