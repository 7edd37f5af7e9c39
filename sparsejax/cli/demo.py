"""Serve a batch of documents with questions, then stream one answer: speed, KV bytes, and what to try next.

The model inside the package looks facts up in documents. Another one is shown with --model.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from sparsejax.cli import options, show
from sparsejax.cli.stories import Story, story

# Sentences of each document, about ten tokens each: short and long requests share every step.
LENGTHS = (8, 12, 16, 24, 32, 40, 48, 64)
NEW_TOKENS = 24
STREAMED_TOKENS = 64

NEXT = """What to try next:
  sparsejax chat --model path/or/hub-id                talk with a model of your own
  sparsejax generate "your text" --max-tokens 64       complete a prompt; --file and --json for many
  sparsejax memory --model path/or/hub-id              what a model and its KV cache need
  sparsejax bench                                      measure this machine
  sparsejax doctor                                     check versions, devices and kernels"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    stories = [story(seed, sentences) for seed, sentences in enumerate(LENGTHS)]
    print("Starting the engine (the first start compiles; later ones are faster) ...", flush=True)
    started = time.perf_counter()
    with options.make_engine(args) as engine:
        print(f"Ready after {time.perf_counter() - started:.1f} s.\n")
        serve_batch(engine, stories)
        stream_one(engine, story(len(LENGTHS), 20))
        print(f"\n{memory_text(engine)}\n\n{NEXT}")
    return 0


def serve_batch(engine: Any, stories: list[Story]) -> None:
    """Serve every document at once; print each answer, and the rates of a second, warm round."""
    from sparsejax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop=["\n"])
    prompts = [one.prompt for one in stories]
    outputs, kv_bytes = generate_watched(engine, prompts, params)
    print(f"{len(stories)} documents served together, one question each:")
    rows, right = [], 0
    for one, output in zip(stories, outputs, strict=True):
        reply = output.outputs[0].text
        good = one.answered_by(reply)
        right += good
        mark = "right" if good else f"should name {one.value}"
        answer = f"-> {show.shorten(reply, 48)}"
        rows.append((f"{len(output.prompt_token_ids)} tokens", f"{one.noun}?", answer, mark))
    print(show.table(rows))
    started = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    new = sum(len(output.outputs[0].token_ids) for output in outputs)
    pool = show.size(engine.memory()["kv_pages"])
    print(
        f"{right} of {len(stories)} answers are right.\n\n"
        f"Once more, warm: {prompt} prompt and {new} new tokens in {seconds:.2f} s, "
        f"{(prompt + new) / seconds:.0f} tokens/s.\n"
        f"KV pages in use at most: {show.size(kv_bytes)} ({kv_bytes / prompt:.0f} bytes per prompt token) "
        f"of a pool of {pool}."
    )


def generate_watched(engine: Any, prompts: list[str], params: Any) -> tuple[list[Any], int]:
    """The outputs in input order, and the bytes of KV pages in use at most."""
    done: dict[str, Any] = {}
    most = 0
    for index, prompt in enumerate(prompts):
        engine.add_request(f"demo-{index}", prompt, params)
    while engine.has_unfinished():
        done |= {output.request_id: output for output in engine.step()}
        most = max(most, engine.stats()["kv_live_bytes"])
    return [done[f"demo-{index}"] for index in range(len(prompts))], most


def stream_one(engine: Any, one: Story) -> None:
    """Stream one answer as it is made and print when its first token came."""
    from sparsejax import SamplingParams

    last = one.text.rstrip().rpartition(". ")[2]
    question = one.prompt[len(one.text) :]
    print(f"\nOne more, streamed as it is made:\n  ... {last}{question}", end="", flush=True)
    params = SamplingParams(temperature=0.0, max_tokens=STREAMED_TOKENS, stop=["\n"])
    started = time.perf_counter()
    first: list[float] = []

    def timed() -> Any:
        for delta in engine.stream(one.prompt, params):
            first.append(time.perf_counter() - started)
            yield delta

    _, tokens, _ = show.stream(timed())
    seconds = time.perf_counter() - started
    if first:
        print(f"\n  (first token after {1e3 * first[0]:.0f} ms, {tokens} tokens in {1e3 * seconds:.0f} ms)")


def memory_text(engine: Any) -> str:
    parts = engine.memory()
    rows = [(name, show.size(count)) for name, count in parts.items()]
    return f"Memory the engine holds:\n{show.table(rows)}"
