"""`/v1/responses`: the basics. Text and function calls in and out, streams; nothing is stored between requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from sparsejax.engine.request import CompletionOutput, RequestOutput
from sparsejax.engine.stream import Stream
from sparsejax.serve.openai.body import Body, read_body, request_schema
from sparsejax.serve.openai.chat import Chat, ChatRequest, render
from sparsejax.serve.openai.errors import ApiError
from sparsejax.serve.openai.events import EventStream, encode, unless_gone
from sparsejax.serve.openai.fields import JsonSchema, ResponseFormat, SamplingFields
from sparsejax.serve.openai.generation import Call
from sparsejax.serve.openai.messages import ContentPart, FunctionCall, FunctionSpec, Message, Tool, ToolCall
from sparsejax.serve.openai.tools import NamedChoice, NamedFunction

router = APIRouter()


class Item(Body):
    """A message, a call that the model made, or what that call returned."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None


class TextFormat(Body):
    type: str
    name: str = "schema"
    schema_: dict[str, Any] | None = None

    model_config = {**Body.model_config, "alias_generator": lambda name: name.rstrip("_")}


class TextOptions(Body):
    format: TextFormat | None = None


class FlatTool(FunctionSpec):
    type: str


class ResponsesRequest(SamplingFields):
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None


@router.post("/v1/responses", openapi_extra=request_schema(ResponsesRequest))
async def respond(request: Request) -> Response:
    """Answers an input."""
    body = await read_body(request, ResponsesRequest)
    call = Call.of(request, body, "resp")
    answer = Answer(call, body, request.app.state.chat_template)
    prompt = await render(request.app.state, answer.chat.body, answer.chat.use_tools)
    if body.stream:
        streams = await call.submit([prompt], answer.chat.params)
        return EventStream(answer.events(streams), call.options.send_timeout, streams, done=b"")
    (output,) = await unless_gone(request.receive, call.finals([prompt], answer.chat.params))
    return JSONResponse(answer.whole(output))


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The chat request that asks for the same.

    Raises:
        ApiError: it uses what only a server with a memory can do, or an unknown kind of item or tool.
    """
    if body.previous_response_id is not None:
        raise ApiError(400, "responses are not stored here: send the whole input.", param="previous_response_id")
    if (body.n or 1) != 1:
        raise ApiError(400, "a response has one answer: leave n out.", param="n")
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    shared = {name: getattr(body, name) for name in SamplingFields.model_fields}
    return ChatRequest(
        **{**shared, "response_format": _format(body)},
        messages=messages + [_message(place, item) for place, item in enumerate(items)],
        tools=[_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        max_completion_tokens=body.max_output_tokens,
    )


def _message(place: int, item: Item) -> Message:
    if item.type == "message" and item.role is not None:
        return Message(role=item.role, content=item.content)
    if item.type == "function_call" and item.name is not None:
        function = FunctionCall(name=item.name, arguments=item.arguments or "{}")
        return Message(role="assistant", tool_calls=[ToolCall(id=item.call_id, function=function)])
    if item.type == "function_call_output" and item.output is not None:
        return Message(role="tool", content=item.output, tool_call_id=item.call_id)
    raise ApiError(400, f"input item {place} is of a kind that is not supported: {item.type[:64]!r}.", param="input")


def _tool(tool: FlatTool) -> Tool:
    if tool.type != "function":
        raise ApiError(400, f"tools of type {tool.type[:64]!r} are not supported; use functions.", param="tools")
    spec = FunctionSpec(name=tool.name, description=tool.description, parameters=tool.parameters)
    return Tool(function=spec)


def _choice(choice: str | dict[str, Any] | None) -> Any:
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, dict) and isinstance(choice.get("name"), str):
        return NamedChoice(function=NamedFunction(name=choice["name"]))
    raise ApiError(400, "tool_choice is none, auto, required or a function's name.", param="tool_choice")


def _format(body: ResponsesRequest) -> ResponseFormat | None:
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.type == "text":
        return body.response_format
    if wanted.type == "json_object":
        return ResponseFormat(type="json_object")
    if wanted.type == "json_schema":
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=wanted.name, schema=wanted.schema_))
    raise ApiError(400, f"text.format of type {wanted.type[:64]!r} is not supported.", param="text.format")


class Answer:
    """One response: a chat whose answer is told as output items."""

    def __init__(self, call: Call, body: ResponsesRequest, chat_template: str | None):
        self.call, self.body = call, body
        self.chat = Chat(call, as_chat(body), chat_template)

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        (part,) = output.outputs
        reader = self.chat.plan.reader()
        delta = reader.feed(part.text, last=True)
        return self._response(self._items(delta.get("content", ""), delta.get("tool_calls", [])), part)

    async def events(self, streams: list[Stream]) -> AsyncGenerator[bytes]:
        sequence = 0

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal sequence
            sequence += 1
            return encode({"type": kind, "sequence_number": sequence - 1, **fields}, name=kind)

        yield event("response.created", response=self._response([], None))
        yield event("response.in_progress", response=self._response([], None))
        reader, text, calls, part = self.chat.plan.reader(), "", [], None
        place = {"item_id": f"msg_{self.call.id}", "output_index": 0, "content_index": 0}
        async for _, output in self.call.interleaved(streams):
            (part,) = output.outputs
            delta = reader.feed(part.text, last=part.finish_reason is not None)
            if new := delta.get("content"):
                if not text:
                    item = {**self._text_item("", "in_progress"), "content": []}
                    yield event("response.output_item.added", output_index=0, item=item)
                    yield event("response.content_part.added", **place, part=_text_part(""))
                text += new
                yield event("response.output_text.delta", **place, delta=new, logprobs=[])
            calls += _joined(calls, delta.get("tool_calls", []))
        if text:
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=_text_part(text))
        items = self._items(text, calls)
        for index, item in enumerate(items):
            if item["type"] == "function_call":
                yield event("response.output_item.added", output_index=index, item={**item, "arguments": ""})
                whole = {"item_id": item["id"], "output_index": index, "arguments": item["arguments"]}
                yield event("response.function_call_arguments.done", **whole, name=item["name"])
            yield event("response.output_item.done", output_index=index, item=item)
        response = self._response(items, part)
        yield event(f"response.{response['status']}", response=response)

    def _items(self, text: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        items = [self._text_item(text, "completed")] if text or not calls else []
        return items + [
            {
                "id": f"fc_{call['id']}",
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
                "status": "completed",
            }
            for call in calls
        ]

    def _text_item(self, text: str, status: str) -> dict[str, Any]:
        return {
            "id": f"msg_{self.call.id}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_text_part(text)],
        }

    def _response(self, items: list[dict[str, Any]], part: CompletionOutput | None) -> dict[str, Any]:
        status, why = "in_progress", None
        if part is not None:
            cut = part.finish_reason == "length"
            status, why = ("incomplete", {"reason": "max_output_tokens"}) if cut else ("completed", None)
        body, usage = self.body, self.call.usage
        counts = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
        return {
            "id": self.call.id,
            "object": "response",
            "created_at": self.call.created,
            "status": status,
            "error": None,
            "incomplete_details": why,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.call.model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": self.chat.params.temperature,
            "top_p": self.chat.params.top_p,
            "text": {"format": {"type": body.text.format.type if body.text and body.text.format else "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "truncation": "disabled",
            "metadata": {},
            "usage": None
            if part is None
            else {
                **counts,
                "total_tokens": sum(counts.values()),
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _joined(calls: list[dict[str, Any]], deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new calls of `deltas`; what continues a call is added to it."""
    new = []
    for delta in deltas:
        if "id" in delta:
            new.append(delta)
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return new
