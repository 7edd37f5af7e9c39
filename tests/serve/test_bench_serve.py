"""`sparsejax bench serve`: its figures by hand, and runs against both servers."""

from __future__ import annotations

import json
import time

import pytest

from sparsejax.cli import load, main
from sparsejax.config import EngineConfig
from sparsejax.engine.async_engine import AsyncEngine
from sparsejax.engine.request import CompletionOutput, RequestOutput
from sparsejax.errors import RequestError
from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.service import Service
from tests.engine.models import text_engine
from tests.serve.live import live

SMALL = ["--num-prompts", "6", "--rate", "50", "--input-len", "8", "--output-len", "5", "--json"]


def test_figures_by_hand():
    answers = [
        load.Answer([0.1, 0.2, 0.4], [1, 1, 2]),
        load.Answer([2.0, 2.1], [1, 1]),
        load.Answer([0.3], [1]),
        load.Answer(error="Overloaded: no", refused=True),
    ]
    figures = load.summary(answers, 10.0, 1.0, 0.2)
    assert (figures["completed"], figures["failed"], figures["total_output_tokens"]) == (3, 1, 7)
    assert figures["refused"] == 1
    assert figures["request_throughput"] == pytest.approx(0.3)
    assert figures["request_goodput"] == pytest.approx(0.2)  # the second waits too long for its first token
    assert figures["median_ttft_ms"] == pytest.approx(300)
    assert figures["p99_ttft_ms"] == pytest.approx(300 + 0.98 * 1700)
    assert figures["mean_itl_ms"] == pytest.approx(100)  # 100, 100, 100 (two tokens in 200 ms) and 100
    assert figures["median_e2el_ms"] == pytest.approx(400)
    assert load.summary([load.Answer([0.1, 0.9], [1, 1])], 1.0, 1.0, 0.2)["request_goodput"] == 0
    assert load.summary([load.Answer(error="no")], 1.0, 1.0, 0.2)["p99_itl_ms"] == 0


def test_arrivals_do_not_wait_for_answers():
    starts = []

    def send(prompt):
        starts.append(time.perf_counter())
        time.sleep(0.3)
        if prompt == [2]:
            raise RequestError("no")
        yield RequestOutput("a", None, None, outputs=[CompletionOutput(0, "x", [1])])

    answers, seconds = load.offer(send, [[0], [1], [2]], [0.0, 0.05, 0.05])
    assert starts[-1] - starts[0] < 0.25 and seconds < 0.8
    assert [answer.good for answer in answers] == [True, True, False] and "RequestError" in answers[2].error


def check(url: str, capsys, tmp_path) -> None:
    picture = tmp_path / "waits.png"
    assert main(["bench", "serve", "--url", url, *SMALL, "--plot", str(picture)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["completed"], figures["failed"], figures["total_output_tokens"]) == (6, 0, 30)
    assert 0 < figures["median_ttft_ms"] <= figures["p99_ttft_ms"] <= figures["p99_e2el_ms"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_against_the_grpc_server(capsys, tmp_path):
    pytest.importorskip("grpc_health")
    pytest.importorskip("grpc_reflection")
    from tests.serve.grpc_live import live_grpc

    with live_grpc(Service(EngineConfig(), load=lambda: AsyncEngine(engine=text_engine()))) as live:
        check(f"grpc://{live.target}", capsys, tmp_path)
        assert main(["bench", "serve", "--url", f"grpc://{live.target}", *SMALL, "--vocab", "1000000"]) == 1
    assert "RequestError" in capsys.readouterr().err


def test_against_the_http_server(server, capsys, tmp_path):
    check(server.url, capsys, tmp_path)


def test_refusals_are_told_from_failures(server, capsys):
    with live(server.beside(ServiceLimits(max_requests=1)), stop=False) as small:
        many = ["--num-prompts", "8", "--rate", "500", "--input-len", "8", "--output-len", "100", "--json"]
        assert main(["bench", "serve", "--url", small.url, *many]) == 0
        said = capsys.readouterr()
        figures = json.loads(said.out)
        assert figures["completed"] >= 1 and figures["refused"] == figures["failed"] == 8 - figures["completed"] > 0
        assert "Overloaded" in said.err and "503" in said.err
        assert main(["bench", "serve", "--url", small.url, *many, "--num-prompts", "1", "--vocab", "1000000"]) == 1
        assert json.loads(capsys.readouterr().out)["refused"] == 0


def test_it_needs_a_server(capsys):
    assert main(["bench", "serve"]) == 2
    assert "--url" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", "--rate", "0"]) == 2
