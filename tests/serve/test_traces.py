"""Spans of requests: inside the caller's trace, with what the log has, and without text."""

from __future__ import annotations

import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is in the extra test")

from opentelemetry import trace  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402

from sparsejax.serve import traces  # noqa: E402

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def spans(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


def test_a_request_is_a_span_in_its_callers_trace(server, http, spans):
    body = {"prompt": "mellifluous", "max_tokens": 3, "ignore_eos": True}
    assert http.post("/v1/completions", json=body, headers=PARENT).status_code == 200
    assert http.post("/v1/completions", json={**body, "n": 0}).status_code == 400
    good, bad = spans()
    assert good.name == "POST /v1/completions" and f"{good.context.trace_id:032x}" == TRACE
    assert good.attributes["gen_ai.usage.output_tokens"] == 3 and good.attributes["sparsejax.first_token_ms"] > 0
    assert good.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert "mellifluous" not in good.to_json() + bad.to_json() and bad.parent is None


def test_failures_are_marked(spans):
    with traces.span("x", {}) as note:
        note({"request_id": "a"}, True)
    (one,) = spans()
    assert one.status.status_code is trace.StatusCode.ERROR and one.attributes["sparsejax.request_id"] == "a"


def test_without_the_library_nothing_happens(monkeypatch):
    monkeypatch.setattr(traces, "trace", None)
    with traces.span("x", PARENT) as note:
        note({"request_id": "a"}, True)
