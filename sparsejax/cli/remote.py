"""A model behind an OpenAI-compatible server, with as much of `Engine` as conversations and measurements need."""

from __future__ import annotations

import dataclasses
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from sparsejax.engine.request import CompletionOutput, RequestOutput, SamplingParams
from sparsejax.errors import RequestError
from sparsejax.serve.errors import Overloaded

TIMEOUT = 600.0
BUSY = (429, 503)


class RemoteEngine:
    """Sends conversations to a server.

    Args:
        url: where it listens, with or without ``/v1``.
        model: name of the model there; None takes the server's first one.
        key: API key, or None.

    Raises:
        RequestError: nobody answers there, or the key is wrong. Overloaded: it takes nothing now.
    """

    tokenizer = SimpleNamespace(chat_template="the server's")

    def __init__(self, url: str, model: str | None = None, key: str | None = None):
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        if model is None:
            with self._open("/models") as response:
                model = json.load(response)["data"][0]["id"]
        self.model = model

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def chat_prompts(self, messages: list[dict[str, str]], **_: Any) -> list[dict[str, Any]]:
        """The messages themselves: the server has the template."""
        return [{"messages": messages}]

    def stream(self, prompt: dict[str, Any], params: SamplingParams) -> Iterator[RequestOutput]:
        """Yields what is new as it comes; closing the iterator closes the connection, which aborts there.

        Args:
            prompt: ``{"messages": [...]}`` or ``{"prompt": text or token ids}``.
        """
        asked = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        default = SamplingParams()
        chosen = {name: value for name, value in asked.items() if value != getattr(default, name)}
        chosen.pop("output_kind", None)
        body = {"model": self.model, **prompt, **chosen, "stream": True, "return_token_ids": True}
        with self._open("/completions" if "prompt" in prompt else "/chat/completions", body) as response:
            for line in response:
                event = line.decode().strip().removeprefix("data: ")
                if event == "[DONE]":
                    return
                if event.startswith("{"):
                    yield from self._outputs(json.loads(event))

    def _outputs(self, event: dict[str, Any]) -> Iterator[RequestOutput]:
        if "error" in event:
            raise RequestError(event["error"]["message"])
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            tokens = choice.get("token_ids") or ([0] if text else [])
            reason = choice.get("finish_reason")
            part = CompletionOutput(choice["index"], text, tokens, finish_reason=reason)
            yield RequestOutput(event["id"], None, None, outputs=[part], finished=reason is not None)

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, self._headers)
            return urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            text = f"{self._url}{path} answered {error.code}: {_message(error)}"
            if error.code in BUSY:
                raise Overloaded(text, float(error.headers.get("Retry-After", 1))) from error
            raise RequestError(text) from error
        except (OSError, ValueError) as error:
            raise RequestError(f"{self._url}{path} cannot be reached: {error}. Check --url.") from error


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:200]
