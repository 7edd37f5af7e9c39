"""OpenTelemetry spans of requests, where the library is installed and something collects them.

Nothing is configured here: `opentelemetry-instrument sparsejax serve` does that from the usual OTEL variables. Without
a collector, or without the library, a span costs next to nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None

ATTRIBUTES = {
    "call": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish": "gen_ai.response.finish_reasons",
    "first_token_ms": "sparsejax.first_token_ms",
    "request_id": "sparsejax.request_id",
}
"""Field of a request's line in the log -> attribute of its span; text of prompts and answers is in neither."""


@contextlib.contextmanager
def span(name: str, headers: Mapping[str, str]) -> Iterator[Callable[[Mapping[str, Any], bool], None]]:
    """Around one request, inside the trace that its headers name; yields what notes how it ended.

    The function takes the request's fields and whether the server failed.
    """
    if trace is None:
        yield lambda fields, failed: None
        return
    tracer, context = trace.get_tracer("sparsejax"), propagate.extract(headers)
    settings = {"kind": trace.SpanKind.SERVER, "record_exception": False, "set_status_on_exception": False}
    with tracer.start_as_current_span(name, context=context, **settings) as current:

        def note(fields: Mapping[str, Any], failed: bool) -> None:
            if "route" in fields:
                current.update_name(f"{name} {fields['route']}")
            for field, attribute in ATTRIBUTES.items():
                if field in fields:
                    current.set_attribute(attribute, fields[field])
            if failed:
                current.set_status(trace.StatusCode.ERROR)

        yield note
