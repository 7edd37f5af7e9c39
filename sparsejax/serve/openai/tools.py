"""What `tools` and `tool_choice` mean for a request: a rule for the output, or a parser of it."""

from __future__ import annotations

import json
import uuid
from typing import Any, Literal

from sparsejax.serve.openai.body import Body
from sparsejax.serve.openai.errors import ApiError
from sparsejax.serve.openai.messages import Tool
from sparsejax.serve.openai.tool_parsers import Format, FoundCall, ToolParser, as_call

ANY_OBJECT = {"type": "object"}
MOST_CALLS = 16


class NamedFunction(Body):
    name: str


class NamedChoice(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class ToolPlan:
    """How one request's answers become text and calls.

    Attributes:
        forced: name of the function whose arguments the whole answer is, or None.
        required: the answer is a JSON list of calls, at most `most`.
    """

    def __init__(
        self, tools: list[Tool] | None, choice: ToolChoice | None, format_: Format | None, parallel: bool = True
    ):
        self.tools = {tool.function.name: tool.function for tool in tools or ()}
        if choice is None:
            choice = "auto" if self.tools else "none"
        if choice not in ("none",) and not self.tools:
            raise ApiError(400, "tool_choice needs tools to choose from.", param="tool_choice")
        self.forced = choice.function.name if isinstance(choice, NamedChoice) else None
        if self.forced is not None and self.forced not in self.tools:
            raise ApiError(400, f"tool_choice names {self.forced!r}, which is no tool here.", param="tool_choice")
        self.required = choice == "required"
        self.most = MOST_CALLS if parallel else 1
        self.format = format_ if choice == "auto" else None

    def rule(self, other: dict[str, Any] | None) -> dict[str, Any] | None:
        """The rule for the output; `other` is the one that the request gives itself.

        Raises:
            ApiError: a forced call and a rule contradict each other.
        """
        if self.forced is None and not self.required:
            return other
        if other is not None:
            raise ApiError(400, "a rule for the output and a forced tool call exclude each other.", param="tool_choice")
        if self.forced is not None:
            return {"json": self.tools[self.forced].parameters or ANY_OBJECT}
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.name},
                    "arguments": _moved(tool.parameters or ANY_OBJECT, f"#/items/anyOf/{place}/properties/arguments"),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for place, tool in enumerate(self.tools.values())
        ]
        return {"json": {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": self.most}}

    def reader(self) -> Reader:
        return Reader(self)


class Reader:
    """Reads one answer, piece by piece, into deltas of a chat message.

    Attributes:
        calls: tool calls found so far.
    """

    def __init__(self, plan: ToolPlan):
        self._plan = plan
        self._parser = None if plan.format is None else ToolParser(plan.format, plan.tools.__contains__)
        self._held = ""
        self.calls = 0

    def feed(self, text: str, last: bool) -> dict[str, Any]:
        """The delta for `text`: ``content``, ``tool_calls``, both or neither."""
        plan = self._plan
        if plan.forced is not None:
            return self._forced(text)
        if plan.required:
            self._held += text
            return self._required() if last else {}
        if self._parser is None:
            return {"content": text} if text else {}
        content, calls = self._parser.feed(text)
        if last:
            rest, more = self._parser.finish()
            content, calls = content + rest, calls + more
        delta: dict[str, Any] = {"content": content} if content else {}
        return {**delta, "tool_calls": [self._call(call) for call in calls]} if calls else delta

    def _forced(self, text: str) -> dict[str, Any]:
        if self.calls == 0:
            return {"tool_calls": [self._call(FoundCall(self._plan.forced or "", text))]}
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]} if text else {}

    def _required(self) -> dict[str, Any]:
        try:
            values = json.loads(self._held)
        except ValueError:  # cut off by the length limit
            return {"content": self._held}
        return {"tool_calls": [self._call(call) for value in values if (call := as_call(value)) is not None]}

    def _call(self, call: FoundCall) -> dict[str, Any]:
        self.calls += 1
        return {
            "index": self.calls - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def finish_reason(self, reason: str | None) -> str | None:
        """``tool_calls`` where the model chose to call; a call by a name that the client gave ends with ``stop``."""
        return "tool_calls" if reason == "stop" and self.calls and self._plan.forced is None else reason


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references still hold after it was put at `root` of another one."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(part, root) for name, part in schema.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = root + target[1:]
    return moved
