"""Chat messages as clients send them, and as chat templates read them."""

from __future__ import annotations

import json
from typing import Any, Literal

from sparsejax.serve.openai.body import Body
from sparsejax.serve.openai.errors import ApiError


class ContentPart(Body):
    type: str
    text: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionSpec(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: FunctionSpec


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """What a chat template is given: plain text, ``system`` for ``developer``, arguments as mappings.

    Raises:
        ApiError: a part is no text, or arguments are no JSON object.
    """
    return [_template_message(place, message) for place, message in enumerate(messages)]


def _template_message(place: int, message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(place, message.content),
    }
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            out[name] = getattr(message, name)
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(place, call.function)},
            }
            for call in message.tool_calls
        ]
    return out


def _text(place: int, content: str | list[ContentPart] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise ApiError(
                400,
                f"message {place} has a part of type {part.type!r}; this server reads parts of type 'text' only.",
                param="messages",
            )
    return "\n".join(part.text or "" for part in content)


def _arguments(place: int, call: FunctionCall) -> dict[str, Any]:
    try:
        value = json.loads(call.arguments or "{}") if isinstance(call.arguments, str) else call.arguments
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"message {place} has tool arguments that are no JSON.", param="messages") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"message {place} has tool arguments that are no JSON object.", param="messages")
    return value
