"""Serve documents with questions, stream an answer, compare policies on one document: answers, KV bytes, speed.

The model inside the package looks facts up in documents. Another one is shown with --model.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from sparsejax.cli import options, show, story
from sparsejax.errors import ConfigError

# Task and tokens of each document: short and long requests share every step.
BATCH = (
    ("niah_single", 128),
    ("kv", 192),
    ("vt", 256),
    ("niah_multikey", 384),
    ("niah_dense", 512),
    ("kv", 640),
    ("vt", 768),
    ("niah_multikey", 1024),
)
STREAMED = ("vt", 256)
NEW_TOKENS = 24

NEXT = """What to try next:
  sparsejax demo --all                                 the same document under every policy (minutes to compile)
  sparsejax chat --model path/or/hub-id                talk with a model of your own
  sparsejax generate "your text" --max-tokens 64       complete a prompt; --file and --json for many
  sparsejax memory --model path/or/hub-id              what a model and its KV cache need
  sparsejax bench                                      measure this machine
  sparsejax eval --quick --plot out.png                what each policy keeps of the answers, and what it reads
  sparsejax doctor                                     check versions, devices and kernels"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="compare every policy, not a few of each kind (minutes)")
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    print("Starting the engine (the first start compiles; later ones are faster) ...", flush=True)
    started = time.perf_counter()
    groups = {} if hasattr(args, "sparsity") else story.policies(args.all)
    first, *others = groups.values() or [()]
    if first:
        args.sparsity = [policy.sparsity for policy in first]
    lines = []
    with options.make_engine(args) as engine:
        print(f"Ready after {time.perf_counter() - started:.1f} s.\n", flush=True)
        if engine.tokenizer is None:
            raise ConfigError("the demo sends text, but this model has no tokenizer: give --tokenizer too.")
        serve_batch(engine, [sample(engine, *one, seed) for seed, one in enumerate(BATCH)])
        stream_one(engine, sample(engine, *STREAMED, len(BATCH)))
        print(f"\n{memory_text(engine)}\n", flush=True)
        if first:
            num_tokens = len(story.document(engine)[0].token_ids)
            lines += story.tell(engine, first)
    for group in others:  # pages of an engine have one codec
        args.sparsity = [policy.sparsity for policy in group]
        with options.make_engine(args) as engine:
            lines += story.tell(engine, group)
    if lines:
        print(f"{story.as_text(lines, num_tokens)}\n")
    print(NEXT)
    return 0


def sample(engine: Any, task: str, length: int, seed: int) -> Any:
    """A document of `length` tokens with a question that has one right answer."""
    from sparsejax.evaluation.tasks import make_sample

    return make_sample(task, length=length, seed=seed, tokenizer=engine.tokenizer)


def serve_batch(engine: Any, samples: list[Any]) -> None:
    """Serve every document at once; print each answer, and the rates of a second, warm round."""
    from sparsejax import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop=["\n"])
    prompts = [one.context + one.turns[0].prompt for one in samples]
    outputs, kv_bytes = generate_watched(engine, prompts, params)
    print(f"{len(samples)} documents served together, one question each:")
    rows, right = [], 0
    for one, output in zip(samples, outputs, strict=True):
        turn, reply = one.turns[0], output.outputs[0].text
        good = turn.score(reply)
        right += good
        mark = "right" if good else f"should be {', '.join(turn.answers)}"
        question = turn.prompt.strip().removeprefix("Q:").removesuffix("A:").strip()
        rows.append((f"{len(output.prompt_token_ids)} tokens", question, show.shorten(reply, 40), mark))
    print(show.table(rows))
    started = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    new = sum(len(output.outputs[0].token_ids) for output in outputs)
    pool = show.size(engine.memory()["kv_pages"])
    print(
        f"{right} of {len(samples)} answers are right.\n\n"
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


def stream_one(engine: Any, one: Any) -> None:
    """Stream one answer as it is made and print when its first token came."""
    from sparsejax import SamplingParams

    question = one.turns[0].prompt
    print(f"\nOne more, streamed as it is made:\n  ...{one.context[-60:]}", end="")
    print(question.replace("\n", "\n  "), end="", flush=True)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop=["\n"])
    started = time.perf_counter()
    first: list[float] = []

    def timed() -> Any:
        for delta in engine.stream(one.context + question, params):
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
