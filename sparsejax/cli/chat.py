"""Talk with a model in the terminal, here or (--url) on an OpenAI-compatible server.

Ctrl-C stops an answer. Ctrl-D or /exit leaves, /reset starts again, /system TEXT sets the system message.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from sparsejax.cli import options, show
from sparsejax.cli.remote import RemoteEngine
from sparsejax.config import EngineConfig
from sparsejax.errors import CapacityError, ConfigError, RequestError

DEFAULT_MAX_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument("--url", help="talk with a server, such as http://127.0.0.1:8000; --model is its name there")
    group.add_argument("--api-key", metavar="KEY", help="key for the server (default: SPARSEJAX_API_KEY)")
    options.add_sampling_options(parser, skip={"n", "logprobs", "prompt_logprobs"})
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    params = options.make_sampling(args, max_tokens=DEFAULT_MAX_TOKENS)
    with options.make_engine(args) if args.url is None else remote_engine(args) as engine:
        Conversation(engine, params, args.system).run()
    return 0


def remote_engine(args: argparse.Namespace) -> RemoteEngine:
    """The server that --url names.

    Raises:
        ConfigError: settings were given that only an engine here could follow.
    """
    local = sorted(options.given(args, EngineConfig, skip={"model", *options.SAMPLING_ONLY}))
    if local:
        flags = ", ".join("--" + name.replace("_", "-") for name in local)
        raise ConfigError(f"{flags} cannot be set through --url: they belong to the command that started the server.")
    return RemoteEngine(args.url, getattr(args, "model", None), args.api_key or os.environ.get("SPARSEJAX_API_KEY"))


class Conversation:
    """A loop of questions and streamed answers over one engine.

    A model without a chat template completes each line as plain text and remembers nothing.
    """

    def __init__(self, engine: Any, params: Any, system: str | None):
        self.engine, self.params, self.system = engine, params, system
        self.templated = bool(getattr(engine.tokenizer, "chat_template", None))
        self.messages = self.fresh()

    def fresh(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def run(self) -> None:
        if not self.templated:
            print("This model has no chat template: each line is completed as plain text, without memory.")
        while (line := self.read()) is not None:
            if line == "/exit":
                return
            if line == "/reset" or line.startswith("/system"):
                self.system = line.removeprefix("/system").strip() if line != "/reset" else self.system
                self.messages = self.fresh()
            elif line:
                self.answer(line)

    def read(self) -> str | None:
        """The next line, without its surrounding space; None at the end of input or on Ctrl-C."""
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None

    def prompt(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        return self.engine.chat_prompts(messages, add_generation_prompt=True)[0]

    def answer(self, line: str) -> None:
        """Stream one answer. A refused request is reported and forgotten; what was said before stays."""
        messages = [*self.messages, {"role": "user", "content": line}]
        started = time.monotonic()
        deltas = None
        try:
            prompt = self.prompt(messages) if self.templated else line
            deltas = self.engine.stream(prompt, self.params)
            text, tokens, _ = show.stream(deltas)
        except KeyboardInterrupt:
            print("\n(stopped)")
            return
        except (RequestError, CapacityError) as error:
            print(f"{error}\n/reset starts a new conversation.", file=sys.stderr)
            return
        finally:
            if deltas is not None:
                deltas.close()  # aborts the request if it still runs
        seconds = time.monotonic() - started
        print(f"\n({tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s)" if sys.stdin.isatty() else "")
        self.messages = [*messages, {"role": "assistant", "content": text}]
