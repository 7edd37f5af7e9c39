"""Complete prompts. They come from the command line, from --file, or from stdin (which is then one prompt).

sparsejax generate "Once upon a time" --max-tokens 64 --temperature 0
sparsejax generate --model path/or/hub-id --file prompts.txt --json > answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sparsejax.cli import options, show
from sparsejax.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to complete")
    group.add_argument(
        "--file",
        metavar="PATH",
        help="one prompt per line; .jsonl has objects with 'prompt' or 'prompt_token_ids'; - is stdin",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    group.add_argument("--chat", action="store_true", help="send each prompt through the model's chat template")
    options.add_sampling_options(parser)
    options.add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(args)
    params = options.make_sampling(args)
    with options.make_engine(args) as engine:
        if args.chat:
            talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = engine.chat_prompts(talks, add_generation_prompt=True)
        if len(prompts) == 1 and params.n == 1 and not args.json:
            show.stream(engine.stream(prompts[0], params))
            print()
            return 0
        for index, output in enumerate(engine.generate(prompts, params)):
            print(json.dumps(as_json(index, output)) if args.json else as_text(index, output))
    return 0


def read_prompts(args: argparse.Namespace) -> list[Any]:
    """The prompts of every source that was given, in the order arguments, file, stdin."""
    prompts: list[Any] = list(args.prompts)
    if args.file:
        prompts += read_file(args.file)
    if not prompts and not sys.stdin.isatty():
        text = sys.stdin.read()
        prompts += [text] if text.strip() else []
    if not prompts:
        raise RequestError("no prompt was given: write it after the command, pipe it in, or use --file PATH.")
    return prompts


def read_file(path: str) -> list[Any]:
    """Prompts of a text file (one per line, blank lines skipped) or of a .jsonl file."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--file {path} cannot be read as UTF-8 text: {error}", parameter="file") from error
    lines = [line for line in text.splitlines() if line.strip()]
    return [from_json(line, path) for line in lines] if path.endswith(".jsonl") else lines


def from_json(line: str, path: str) -> Any:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"--file {path} has a line that is not JSON: {error}", parameter="file") from error
    if isinstance(record, str):
        return record
    if isinstance(record, dict) and "prompt_token_ids" in record:
        return {"prompt_token_ids": record["prompt_token_ids"]}
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return record["prompt"]
    raise RequestError(
        f"--file {path}: each line must be a string or an object with 'prompt' or 'prompt_token_ids', not "
        f"{show.shorten(line)}",
        parameter="file",
    )


def as_text(index: int, output: Any) -> str:
    lines = [f"[{index + 1}] {show.shorten(output.prompt or 'token ids')}"]
    for part in output.outputs:
        lines += [part.text, ""]
    return "\n".join(lines)


def as_json(index: int, output: Any) -> dict[str, Any]:
    """One RequestOutput as plain JSON; log-probabilities appear when they were asked for."""
    return {
        "index": index,
        "prompt": output.prompt,
        "prompt_tokens": len(output.prompt_token_ids or ()),
        "prompt_logprobs": logprobs_json(output.prompt_logprobs),
        "outputs": [
            {
                "text": part.text,
                "token_ids": list(part.token_ids),
                "finish_reason": part.finish_reason,
                "stop_reason": part.stop_reason,
                "cumulative_logprob": part.cumulative_logprob,
                "logprobs": logprobs_json(part.logprobs),
            }
            for part in output.outputs
        ],
    }


def logprobs_json(positions: Any) -> list[dict[str, float] | None] | None:
    if positions is None:
        return None
    return [p and {str(token): entry.logprob for token, entry in p.items()} for p in positions]
