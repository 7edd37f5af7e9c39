"""Serve a batch of prompts with the model inside the package, then stream one answer."""

from __future__ import annotations

import argparse
import time
from typing import Any

from sparsejax.cli import options, show

PROMPTS = (
    "The lighthouse keeper",
    "Once upon a time",
    "In the morning the river",
    "The old clock",
)
STREAMED = "The quiet road"
NEW_TOKENS = 48

NEXT = """What to try next:
  sparsejax generate "your text" --max-tokens 64      complete a prompt
  sparsejax chat --model path/or/hub-id               talk with a model of your own
  sparsejax bench                                     measure this machine
  sparsejax doctor                                    check versions, devices and kernels"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    from sparsejax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    print("Starting the engine (the first start compiles; later ones are faster) ...", flush=True)
    started = time.perf_counter()
    with options.make_engine(args) as engine:
        print(f"Ready after {time.perf_counter() - started:.1f} s.\n")
        serve_batch(engine, params)
        print(f"\nOne more, streamed as it is made:\n  {STREAMED}", end="", flush=True)
        show.stream(engine.stream(STREAMED, params))
        print(f"\n\n{memory_text(engine)}\n\n{NEXT}")
    return 0


def serve_batch(engine: Any, params: Any) -> None:
    """Serve every prompt at once and print each answer and the rate."""
    started = time.perf_counter()
    outputs = engine.generate(list(PROMPTS), params)
    seconds = time.perf_counter() - started
    print(f"{len(PROMPTS)} prompts served together:")
    for output in outputs:
        print(f"  {output.prompt} -> {show.shorten(output.outputs[0].text)}")
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    new = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(
        f"{prompt} prompt tokens and {new} new tokens in {seconds:.2f} s: {new / seconds:.0f} new tokens/s."
    )


def memory_text(engine: Any) -> str:
    parts = engine.memory()
    rows = [(name, show.size(count)) for name, count in parts.items()]
    return f"Memory the engine holds:\n{show.table(rows)}"
