"""Tool calls in a model's text: the formats of common model families, found while the text streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FoundCall:
    """A call that the model wrote; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Format:
    """How a family writes calls.

    Attributes:
        start: text that begins a call; empty if the whole answer is one or none.
        end: text that ends it; empty if it goes to the end of the answer.
    """

    start: str
    end: str


FORMATS = {
    "hermes": Format("<tool_call>", "</tool_call>"),
    "llama3_json": Format("", ""),
}
PYTHON_TAG = "<|python_tag|>"


def format_for(name: str, chat_template: str | None) -> Format | None:
    """The format called `name`; ``auto`` reads it off the chat template, None switches parsing off."""
    if name == "none":
        return None
    if name == "auto":
        text = chat_template or ""
        llama = "<tool_call>" not in text and ("python_tag" in text or "<|start_header_id|>" in text)
        name = "llama3_json" if llama else "hermes"
    return FORMATS[name]


class ToolParser:
    """Splits one answer into text and calls. Text that may begin a call is held back until it is clear.

    What looks like a call and is not one (no JSON, no name) stays text, so nothing that the model wrote is lost.
    """

    def __init__(self, format_: Format, is_tool: Callable[[str], bool]):
        self._format, self._is_tool = format_, is_tool
        self._held = ""
        self._any_text = self._after_call = False

    def feed(self, text: str) -> tuple[str, list[FoundCall]]:
        """Adds text; returns what is certain by now."""
        self._held += text
        return self._whole_answer() if not self._format.start else self._tagged(last=False)

    def finish(self) -> tuple[str, list[FoundCall]]:
        """What is left when the answer has ended."""
        if self._format.start:
            return self._tagged(last=True)
        held, self._held = self._held, ""
        calls = [] if self._any_text else self._read_calls(held.strip().removeprefix(PYTHON_TAG))
        return ("", calls) if calls else (held, [])

    def _whole_answer(self) -> tuple[str, list[FoundCall]]:
        """An answer that begins like a call is held to its end; another one is text at once."""
        begin = self._held.lstrip()
        if not self._any_text and (begin == "" or begin[0] == "{" or PYTHON_TAG.startswith(begin[: len(PYTHON_TAG)])):
            return "", []
        self._any_text = True
        held, self._held = self._held, ""
        return held, []

    def _tagged(self, last: bool) -> tuple[str, list[FoundCall]]:
        start, end = self._format.start, self._format.end
        texts: list[str] = []
        calls: list[FoundCall] = []
        while (at := self._held.find(start)) >= 0:
            stop = self._held.find(end, at)
            if stop < 0 and not last:
                texts.append(self._visible(self._held[:at]))
                self._held = self._held[at:]
                break
            after = len(self._held) if stop < 0 else stop + len(end)
            inside = self._held[at + len(start) : after if stop < 0 else stop]
            found = self._read_calls(inside)
            calls += found
            texts.append(self._visible(self._held[:at] if found else self._held[:after]))
            self._after_call = self._after_call or bool(found)
            self._held = self._held[after:]
        else:
            keep = 0 if last else _overlap(self._held, start)
            texts.append(self._visible(self._held[: len(self._held) - keep]))
            self._held = self._held[len(self._held) - keep :]
        return "".join(texts), calls

    def _visible(self, text: str) -> str:
        """`text` without the line breaks that only set calls apart."""
        if self._after_call:
            text = text.lstrip("\n")
            self._after_call = not text
        return text

    def _read_calls(self, text: str) -> list[FoundCall]:
        """The calls written in `text`, several of them with semicolons between; none if any is not a call."""
        try:
            values = [json.loads(text)]
        except (ValueError, RecursionError):
            try:
                values = [json.loads(part) for part in text.split(";")]
            except (ValueError, RecursionError):
                return []
        calls = [as_call(value) for value in (values[0] if isinstance(values[0], list) else values)]
        return calls if calls and all(call is not None and self._is_tool(call.name) for call in calls) else []


def as_call(value: Any) -> FoundCall | None:
    """A call out of ``{"name": ..., "arguments" or "parameters": {...}}``, or None."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return FoundCall(value["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return FoundCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, start: str) -> int:
    """Length of the longest end of `text` that begins `start`."""
    return next((size for size in range(min(len(start) - 1, len(text)), 0, -1) if text.endswith(start[:size])), 0)
