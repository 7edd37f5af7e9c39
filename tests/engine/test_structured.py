"""Outputs that follow a rule: always valid, beside free rows, without a compile, and whole after a preemption."""

from __future__ import annotations

import json
import random
import re

import pytest

from sparsejax import SamplingParams
from sparsejax.engine.structured import StructuredOutputs
from sparsejax.errors import RequestError
from tests.engine.models import text_engine
from tests.engine.schemas import random_schema

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")
PROMPT = " box: 204; lamp: 311;\nQ: What is the value of box?\nA:"


@pytest.fixture(scope="module")
def engine():
    with text_engine(enable_prefix_caching=False) as engine:  # shared pages would leave room for all
        yield engine


def run(engine, requests: list[tuple[str, dict]]) -> list:
    return engine.generate([prompt for prompt, _ in requests], [SamplingParams(**options) for _, options in requests])


def free(index: int) -> dict:
    return dict(temperature=0.7 * (index % 3), seed=index, max_tokens=12, logprobs=index % 4)


def ruled(rule: dict, **options) -> dict:
    return {**dict(structured_outputs=rule, max_tokens=300, temperature=1.0, seed=5), **options}


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 21))])
def test_random_schemas_beside_free_rows(engine, seed):
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(24)]
    alone = run(engine, [(PROMPT, free(index)) for index in range(12)])
    before = engine.stats()["compiles"]
    requests = []
    for index, schema in enumerate(schemas):
        requests.append((PROMPT, ruled({"json": schema}, seed=index, temperature=rng.choice([0.0, 1.0, 2.0]))))
        if index % 2:
            requests.append((PROMPT, free(index // 2)))
    outputs = [output.outputs[0] for output in run(engine, requests)]
    texts = [output for output, (_, options) in zip(outputs, requests, strict=True) if "structured_outputs" in options]
    for output, schema in zip(texts, schemas, strict=True):
        assert output.finish_reason == "stop", (output.text, schema)
        jsonschema.validate(json.loads(output.text), schema)
    rest = [output for output in outputs if not any(output is text for text in texts)]
    assert [output.token_ids for output in rest] == [output.outputs[0].token_ids for output in alone]
    assert engine.stats()["compiles"] == before
    assert engine.stats()["kv_live_pages"] == 0


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        ({"regex": "[a-f]{3}-[0-9]{2,4}"}, "[a-f]{3}-[0-9]{2,4}"),
        ({"choice": ["yes", "no", 'say "hi"\n']}, 'yes|no|say "hi"\n'),
        ({"grammar": 'start: "x" ("+" "x")~2'}, "x\\+x\\+x"),
        ({"grammar": 'root ::= "a" [0-9] "b"'}, "a[0-9]b"),
    ],
)
def test_other_rules(engine, rule, pattern):
    (output,) = run(engine, [(PROMPT, dict(structured_outputs=rule, n=3, max_tokens=60, temperature=1.5, seed=2))])
    assert all(re.fullmatch(pattern, part.text) for part in output.outputs), output.outputs


def test_any_json_object_and_the_length_limit(engine):
    (output,) = run(engine, [(PROMPT, ruled({"json_object": True}, max_tokens=2))])
    assert output.outputs[0].text.startswith("{") and output.outputs[0].finish_reason == "length"


def test_a_preempted_output_stays_valid(engine):
    """More long rows than the pool holds: some are computed twice, and their rule goes on where it was."""
    item = {"type": "integer", "minimum": 100, "maximum": 999}
    schema = {"type": "array", "items": item, "minItems": 40, "maxItems": 40}
    requests = [(PROMPT * 4, ruled({"json": schema}, max_tokens=500, seed=index)) for index in range(4)]
    before = engine.stats()["num_preemptions"]
    for output in run(engine, requests):
        jsonschema.validate(json.loads(output.outputs[0].text), schema)
    assert engine.stats()["num_preemptions"] > before


@pytest.mark.parametrize(
    "rule",
    [
        {"json": {"type": "banana"}},
        {"json": "{not json"},
        {"json": "[1]"},
        {"regex": "("},
        {"grammar": "start: ???"},
        {"grammar": "root ::= ("},
        {"choice": []},
        {"regex": "a", "choice": ["a"]},
        {"xml": "a"},
        {},
        {"json_object": "yes"},
        "json",
    ],
)
def test_bad_rules_are_request_errors(engine, rule):
    with pytest.raises(RequestError, match="structured_outputs"):
        engine.generate(PROMPT, {"structured_outputs": rule})


@pytest.mark.parametrize(
    "extra", [{"min_tokens": 2}, {"bad_words": ["a"]}, {"allowed_token_ids": [5]}, {"ignore_eos": True}]
)
def test_rules_that_another_setting_would_break_are_refused(extra):
    with pytest.raises(RequestError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"}, **extra)


def test_equal_rules_share_a_grammar():
    assert StructuredOutputs(json='{"type":  "null"}').key == StructuredOutputs(json={"type": "null"}).key
