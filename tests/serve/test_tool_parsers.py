"""Calls in a model's text: found however the text is cut, and nothing that is no call gets lost."""

from __future__ import annotations

import json
import random

import pytest

from sparsejax.serve.openai.tool_parsers import FORMATS, ToolParser, format_for

CALL = '{"name": "weather", "arguments": {"city": "Oslo", "é": [1, {"a": null}]}}'
OTHER = '{"name": "other", "arguments": {}}'
PARSED = ("weather", {"city": "Oslo", "é": [1, {"a": None}]})
HERMES = [
    ("plain text", "plain text", []),
    (f"<tool_call>{CALL}</tool_call>", "", [PARSED]),
    (f"I look.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "I look.\n", [PARSED, PARSED]),
    (f"<tool_call>{CALL}</tool_call> done", " done", [PARSED]),
    (f"<tool_call>{CALL}", "", [PARSED]),
    ("a <tool_call> b", "a <tool_call> b", []),
    ("a < b <tool", "a < b <tool", []),
    (f"<tool_call>{OTHER}</tool_call>", f"<tool_call>{OTHER}</tool_call>", []),
    ("<tool_call>[1]</tool_call>x", "<tool_call>[1]</tool_call>x", []),
    ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
]
LLAMA = [
    ("plain {text}", "plain {text}", []),
    (CALL.replace("arguments", "parameters"), "", [PARSED]),
    (f"<|python_tag|>{CALL}", "", [PARSED]),
    (f"{CALL}; {CALL}", "", [PARSED, PARSED]),
    (f"[{CALL}]", f"[{CALL}]", []),
    ('{"name": "other"}', '{"name": "other"}', []),
    ('{"answer": 1}', '{"answer": 1}', []),
    ("{", "{", []),
    ("", "", []),
]


def parse(name: str, pieces: list[str]) -> tuple[str, list]:
    parser = ToolParser(FORMATS[name], "weather".__eq__)
    text, calls = "", []
    for piece in pieces:
        more, found = parser.feed(piece)
        text, calls = text + more, calls + found
    more, found = parser.finish()
    return text + more, [(call.name, json.loads(call.arguments)) for call in calls + found]


@pytest.mark.parametrize(
    ("name", "answer", "text", "calls"),
    [("hermes", *case) for case in HERMES] + [("llama3_json", *case) for case in LLAMA],
)
def test_calls_are_found_however_the_text_is_cut(name, answer, text, calls):
    rng = random.Random(answer)
    assert parse(name, [answer]) == (text, calls)
    assert parse(name, list(answer)) == (text, calls)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(answer) + 1), k=4))
        pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        assert parse(name, pieces) == (text, calls)


def test_text_before_a_call_is_not_held_back():
    parser = ToolParser(FORMATS["hermes"], "weather".__eq__)
    assert parser.feed("I look. <to") == ("I look. ", [])
    assert parser.feed("wn> no. ") == ("<town> no. ", [])


@pytest.mark.parametrize(
    ("name", "template", "wanted"),
    [
        ("auto", None, "hermes"),
        ("auto", "... <tool_call> ...", "hermes"),
        ("auto", "<|start_header_id|>", "llama3_json"),
        ("llama3_json", "... <tool_call> ...", "llama3_json"),
    ],
)
def test_the_format_is_read_off_the_template(name, template, wanted):
    assert format_for(name, template) is FORMATS[wanted]
    assert format_for("none", template) is None
