"""A stand-in engine: the command line is tested without JAX or a model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sparsejax.cli import options
from sparsejax.engine.request import CompletionOutput, RequestOutput, SamplingParams
from sparsejax.errors import RequestError
from sparsejax.sparsity.policy import SparsityConfig


class WordTokenizer:
    """A token per word."""

    chat_template: str | None = "messages"

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.split())


class EchoEngine:
    """Answers every prompt with its own text; remembers what it was asked."""

    max_model_len = 1024
    config = SimpleNamespace(page_size=16)
    core = SimpleNamespace(policy_of=lambda params, num_prompt: SparsityConfig.coerce("dense"))

    def __init__(self) -> None:
        self.tokenizer: Any = WordTokenizer()
        self.waiting: list[RequestOutput] = []
        self.asked: list[tuple[str, SamplingParams]] = []
        self.closed = False
        self.aborted = 0
        self.interrupt_after: int | None = None

    def __enter__(self) -> EchoEngine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed = True

    def chat_prompts(self, messages: list, **options: Any) -> list[dict[str, Any]]:
        if not self.tokenizer.chat_template:
            raise RequestError("this model has no chat template", parameter="messages")
        talks = messages if isinstance(messages[0], list) else [messages]
        texts = ["".join(f"{m['role'][0]}:{m['content']};" for m in talk) for talk in talks]
        return [{"prompt": text, "prompt_token_ids": [ord(c) for c in text]} for text in texts]

    def text_of(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        ids = prompt["prompt_token_ids"]
        return " ".join(ids) if isinstance(ids[0], str) else "".join(chr(i) for i in ids)

    def output(self, index: int, prompt: Any, text: str) -> RequestOutput:
        ids = [ord(c) for c in text]
        done = CompletionOutput(0, text, ids, finish_reason="stop")
        return RequestOutput(str(index), self.text_of(prompt), ids, outputs=[done], finished=True)

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        (output,) = self.generate([prompt], params)
        output.request_id = request_id
        self.waiting.append(output)

    def has_unfinished(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[RequestOutput]:
        return [self.waiting.pop()] if self.waiting else []

    def generate(self, prompts: list[Any], params: SamplingParams, use_tqdm: bool = True) -> list[RequestOutput]:
        self.asked += [(self.text_of(prompt), params) for prompt in prompts]
        return [self.output(i, p, self.text_of(p).upper()) for i, p in enumerate(prompts)]

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[RequestOutput]:
        text = self.text_of(prompt)
        self.asked.append((text, params))
        if "refuse" in text:
            raise RequestError("this prompt is refused.", parameter="prompt")
        try:
            for count, word in enumerate(text.upper().split(" ")):
                if count == self.interrupt_after:
                    raise KeyboardInterrupt
                yield self.output(0, prompt, word + " ")
        except GeneratorExit:
            self.aborted += 1
            raise

    def memory(self) -> dict[str, int]:
        return {"weights": 3 * 2**20, "kv_pages": 2**20, "total": 4 * 2**20}

    def stats(self) -> dict[str, int]:
        asked = len(self.asked)
        return {
            "kv_live_bytes": 2**10 * len(self.waiting),
            "compile_seconds": 0.0,
            "decode_queries": asked,
            "decode_held_bytes": 4 * asked,
            "decode_pages_held": asked,
            "decode_read_bytes": asked,
        }


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EchoEngine:
    fake = EchoEngine()
    monkeypatch.setattr(options, "make_engine", lambda args: fake)
    return fake
