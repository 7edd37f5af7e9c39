"""The openai client, as it is, against the server: everything that its users call."""

from __future__ import annotations

import json

import openai
import pytest

from tests.serve.live import MODEL

TALK = [{"role": "user", "content": " box: 204;\nWhat is the value of box?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            },
        },
    }
    for name in ("weather", "forecast")
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "sparsejax")
    assert client.models.retrieve(MODEL).max_model_len == 1024
    with pytest.raises(openai.NotFoundError, match="no model") as refused:
        client.models.retrieve("gpt-9")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt-9", prompt="x")


def test_completions_of_every_kind_of_prompt(client):
    texts = [" box: 204;", " lamp: 311;\nQ:"]
    both = client.completions.create(model=MODEL, prompt=texts, max_tokens=8, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.completion_tokens <= 16
    assert both.usage.total_tokens == both.usage.prompt_tokens + both.usage.completion_tokens
    for text, choice in zip(texts, both.choices, strict=True):
        ids = client.post("../tokenize", body={"prompt": text}, cast_to=dict)["tokens"]
        for prompt in (text, ids, [ids]):
            alone = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
            assert alone.choices[0].text == choice.text


def test_samples_seeds_and_biases(client):
    ask = dict(model=MODEL, prompt=" box:", max_tokens=6, seed=7)
    first, again = (client.completions.create(**ask, n=3) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert len({choice.text for choice in first.choices}) == 3
    forced = client.completions.create(**ask, logit_bias={"100": 100}, extra_body={"return_token_ids": True})
    assert forced.choices[0].token_ids == [100] * 6
    only = client.completions.create(**ask, extra_body={"allowed_token_ids": [61], "top_k": 5, "min_p": 0.1})
    assert only.choices[0].finish_reason == "length"


def test_salts_keep_tenants_apart(client):
    prompt, seen = [9 + place % 40 for place in range(60)], []
    for salt in ("one", "two", None, "one"):
        extra = {} if salt is None else {"cache_salt": salt}
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, extra_body=extra)
        seen.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert seen == [0, 0, 0, 48]  # whole pages of the prompt
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        client.completions.create(model=MODEL, prompt=prompt, extra_body={"cache_salt": ""})


def test_echo_scores_a_prompt(client):
    """What evaluation harnesses send: a prompt as token ids, echoed, its log-probabilities, nothing new."""
    ids = client.post("../tokenize", body={"prompt": " box: 204; lamp"}, cast_to=dict)["tokens"]
    for wanted in (0, 1):
        ask = dict(model=MODEL, max_tokens=wanted, temperature=0)
        answer = client.completions.create(**ask, prompt=ids, echo=True, logprobs=1)
        logprobs = answer.choices[0].logprobs
        assert len(logprobs.tokens) == len(ids) + wanted == len(logprobs.text_offset)
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs[1:])
        assert answer.choices[0].text.startswith("<bos> box: 204; lamp")
        assert answer.usage.completion_tokens == wanted


def test_chat_whole_and_streamed(client):
    ask = dict(model=MODEL, messages=TALK, max_tokens=20, temperature=0)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    usage = chunks[-1].usage.model_copy(update={"prompt_tokens_details": whole.usage.prompt_tokens_details})
    assert chunks[-1].choices == [] and usage == whole.usage  # but for what was cached by then
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id != whole.id
    parts = [{"role": "user", "content": [{"type": "text", "text": TALK[0]["content"]}]}]
    assert client.chat.completions.create(**{**ask, "messages": parts}).choices[0].message == whole.choices[0].message


def test_chat_without_a_limit_ends_by_itself(client):
    answer = client.chat.completions.create(model=MODEL, messages=TALK, temperature=0)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens > 100


def test_chat_logprobs(client):
    ask = dict(model=MODEL, messages=TALK, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3)
    content = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert len(content) == 12
    for token in content:
        best = [top.logprob for top in token.top_logprobs]
        assert best == sorted(best, reverse=True) and token.logprob == best[0]
    streamed = [
        token
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in content]
    text = client.chat.completions.create(**ask).choices[0].message.content
    assert bytes(byte for token in content for byte in token.bytes).decode("utf-8", "replace") == text


def test_tools_that_must_be_called(client):
    ask = dict(model=MODEL, messages=TALK, tools=TOOLS, temperature=1.0, seed=3, max_tokens=300)
    required = client.chat.completions.create(**ask, tool_choice="required").choices[0]
    assert required.finish_reason == "tool_calls" and required.message.content is None
    for call in required.message.tool_calls:
        check(call)
    named = client.chat.completions.create(**ask, tool_choice={"type": "function", "function": {"name": "weather"}})
    (call,) = named.choices[0].message.tool_calls
    check(call)
    assert call.function.name == "weather"
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        calls: dict[int, dict] = {}
        for chunk in client.chat.completions.create(**ask, tool_choice=choice, stream=True):
            for delta in chunk.choices[0].delta.tool_calls or ():
                one = calls.setdefault(delta.index, {"name": "", "arguments": ""})
                one["name"] += delta.function.name or ""
                one["arguments"] += delta.function.arguments or ""
        same = required.message.tool_calls if choice == "required" else [call]
        assert [(one["name"], one["arguments"]) for one in calls.values()] == [
            (its.function.name, its.function.arguments) for its in same
        ]


def check(call) -> None:
    arguments = json.loads(call.function.arguments)
    assert call.function.name in ("weather", "forecast") and call.id
    assert arguments["city"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9 and len(arguments) == 2


def test_a_tool_that_the_model_chooses(client):
    """The answer is steered into the form that models are trained on; the parser finds the call in it."""
    call = '\\{"name": "weather", "arguments": \\{"city": "Oslo", "days": [1-9]\\}\\}'
    written = f"Hi! <tool_call>\\n{call}\\n</tool_call>"
    ask = dict(model=MODEL, messages=TALK, tools=TOOLS, max_tokens=200, extra_body={"guided_regex": written})
    choice = client.chat.completions.create(**ask).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Hi! ")
    check(choice.message.tool_calls[0])
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    assert "".join(one.delta.content or "" for one in deltas) == "Hi! "
    (streamed,) = [call for one in deltas for call in one.delta.tool_calls or ()]
    check(streamed)
    assert deltas[-1].finish_reason == "tool_calls"
    ignored = client.chat.completions.create(**ask, tool_choice="none").choices[0]
    assert ignored.message.tool_calls is None and "<tool_call>" in ignored.message.content


def test_a_conversation_with_calls_and_results_is_read(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    talk = [*TALK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    talk += [{"role": "tool", "tool_call_id": "call_1", "content": "rain"}]
    answer = client.chat.completions.create(model=MODEL, messages=talk, max_tokens=4)
    assert answer.choices[0].message.role == "assistant"


def test_response_formats(client):
    ask = dict(model=MODEL, messages=TALK, max_tokens=200, seed=1)
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    person = json.loads(client.chat.completions.create(**ask, response_format=schema).choices[0].message.content)
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 150
    for extra in ({"guided_choice": ["left", "right"]}, {"structured_outputs": {"choice": ["left", "right"]}}):
        answer = client.chat.completions.create(**ask, extra_body=extra)
        assert answer.choices[0].message.content in ("left", "right")
        assert answer.choices[0].finish_reason == "stop"
    anything = client.chat.completions.create(**{**ask, "max_tokens": 3}, response_format={"type": "json_object"})
    assert anything.choices[0].message.content.startswith("{")


def test_responses(client):
    ask = dict(model=MODEL, instructions="Be brief.", max_output_tokens=10, temperature=0)
    ask["input"] = "What is the value of box?"
    whole = client.responses.create(**ask)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.usage.output_tokens == 10
    events = list(client.responses.create(**ask, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created" and events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    form = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA}}
    person = client.responses.create(model=MODEL, input="x", text=form, max_output_tokens=200).output_text
    assert set(json.loads(person)) == {"name", "age"}
    tools = [{"type": "function", **TOOLS[0]["function"]}]
    one = dict(tools=tools, tool_choice="required", parallel_tool_calls=False, max_output_tokens=300)
    called = client.responses.create(model=MODEL, input="x", **one)
    assert [item.type for item in called.output] == ["function_call"] and called.output[0].name == "weather"
    talk = [{"role": "user", "content": "x"}, called.output[0].model_dump()]
    talk += [{"type": "function_call_output", "call_id": called.output[0].call_id, "output": "rain"}]
    assert client.responses.create(model=MODEL, input=talk, max_output_tokens=4).status == "incomplete"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 10_000}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 99}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": "x " * 5000}, "prompt"),
        ({"extra_body": {"sparsity": "quest"}}, "sparsity"),
        ({"extra_body": {"sparsity": {"preset": "quest", "budjet": 3}}}, "sparsity"),
        ({"extra_body": {"guided_regex": "("}}, "structured_outputs"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["a"]}}, "guided_choice"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options"),
        ({"extra_body": {"top_k": "many"}}, "top_k"),
    ],
)
def test_bad_requests_name_the_field(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": MODEL, "prompt": "x", **options})
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == param


def test_a_prompt_that_is_too_long_says_so(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=[5] * 2000)
    assert refused.value.code == "context_length_exceeded"
