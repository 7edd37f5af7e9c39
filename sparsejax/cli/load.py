"""`sparsejax bench serve`: open-loop load on a server, and how long its users wait.

Requests start at the times of a Poisson process, whether earlier ones have been answered or not, so that a server that
is too slow shows it. Names of the figures are those of vLLM's serving benchmark.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsejax.cli import show
from sparsejax.errors import ConfigError, RequestError, SparseJaxError
from sparsejax.serve.errors import Overloaded

Send = Callable[[list[int]], Iterator[Any]]


@dataclass
class Answer:
    """One request: seconds after its start at which tokens came, and how many came then.

    Attributes:
        refused: the server said that it is busy.
    """

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    error: str | None = None
    refused: bool = False

    @property
    def good(self) -> bool:
        return self.error is None and bool(self.times)

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; tokens that came together share the time before them."""
        pairs = zip(self.times, self.times[1:], self.counts[1:], strict=False)
        return [(now - before) / count for before, now, count in pairs for _ in range(count)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("bench serve")
    group.add_argument("--url", help="the server: http://HOST:PORT (OpenAI's API) or grpc://HOST:PORT")
    group.add_argument("--api-key", metavar="KEY", help="API key or token")
    group.add_argument("--rate", type=float, default=2.0, metavar="X", help="requests per second (default: 2)")
    group.add_argument("--vocab", type=int, default=100, metavar="N", help="prompts are ids below this (default: 100)")
    group.add_argument("--slo-first-token-ms", type=float, default=1000.0, metavar="X", help="goodput (default: 1000)")
    group.add_argument("--slo-token-ms", type=float, default=200.0, metavar="X", help="goodput (default: 200)")
    group.add_argument("--plot", metavar="FILE", help="write the distributions as a picture")


def run(args: argparse.Namespace) -> int:
    if not args.url:
        raise ConfigError("bench serve needs --url http://HOST:PORT or grpc://HOST:PORT.")
    if args.rate <= 0 or args.vocab < 1:
        raise RequestError("--rate must be above 0 and --vocab at least 1.", parameter="rate")
    draw = random.Random(0)
    prompts = [[draw.randrange(args.vocab) for _ in range(args.input_len)] for _ in range(args.num_prompts)]
    waits = [draw.expovariate(args.rate) for _ in prompts]
    answers, seconds = offer(sender(args), prompts, waits)
    figures = summary(answers, seconds, args.slo_first_token_ms / 1000, args.slo_token_ms / 1000)
    if args.plot:
        draw_plot(answers, Path(args.plot))
    print(json.dumps(figures, indent=2) if args.json else show.table(list(as_rows(figures))))
    for error in sorted({answer.error for answer in answers if answer.error}):
        print(f"failed: {show.shorten(error, 200)}", file=sys.stderr)
    return 0 if figures["completed"] else 1


def sender(args: argparse.Namespace) -> Send:
    """How one prompt is sent; yields outputs as they come."""
    from sparsejax.engine.request import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    scheme, _, target = args.url.partition("://")
    if scheme == "grpc":
        from sparsejax.serve.grpc.client import GrpcClient

        client = GrpcClient(target, token=args.api_key, timeout=600)
        return lambda prompt: client.stream(prompt, params)
    from sparsejax.cli.remote import RemoteEngine

    remote = RemoteEngine(args.url, None, args.api_key)
    return lambda prompt: remote.stream({"prompt": prompt}, params)


def offer(send: Send, prompts: Sequence[list[int]], waits: Sequence[float]) -> tuple[list[Answer], float]:
    """Starts each prompt after its wait, reads every answer on a thread, and says how long all took."""
    answers = [Answer() for _ in prompts]
    threads = [
        threading.Thread(target=read_answer, args=(send, prompt, answer), daemon=True)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    start = due = time.perf_counter()
    for thread, wait in zip(threads, waits, strict=True):
        due += wait
        time.sleep(max(0.0, due - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.perf_counter() - start


def read_answer(send: Send, prompt: list[int], answer: Answer) -> None:
    """Sends one prompt and notes in `answer` what comes and when."""
    start = time.perf_counter()
    try:
        for output in send(prompt):
            count = sum(len(part.token_ids) for part in output.outputs)
            if count:
                answer.times.append(time.perf_counter() - start)
                answer.counts.append(count)
    except (SparseJaxError, OSError) as error:
        answer.error, answer.refused = f"{type(error).__name__}: {error}", isinstance(error, Overloaded)


def summary(answers: Sequence[Answer], seconds: float, first_slo: float, token_slo: float) -> dict[str, float]:
    """Rates, and mean, median and percentiles of the waits in milliseconds."""
    good = [answer for answer in answers if answer.good]
    within = [
        answer for answer in good if answer.times[0] <= first_slo and _mean(answer.gaps) <= token_slo
    ]
    figures: dict[str, float] = {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "refused": sum(answer.refused for answer in answers),
        "duration": seconds,
        "total_output_tokens": sum(answer.tokens for answer in good),
        "request_throughput": len(good) / seconds,
        "request_goodput": len(within) / seconds,
        "output_throughput": sum(answer.tokens for answer in good) / seconds,
    }
    waits = {
        "ttft": [answer.times[0] for answer in good],
        "tpot": [_mean(answer.gaps) for answer in good if answer.gaps],
        "itl": [gap for answer in good for gap in answer.gaps],
        "e2el": [answer.times[-1] for answer in good],
    }
    for name, values in waits.items():
        figures[f"mean_{name}_ms"] = 1000 * _mean(values)
        for label, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99)):
            figures[f"{label}_{name}_ms"] = 1000 * percentile(values, share)
    return figures


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not pass, interpolated between neighbours; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def as_rows(figures: dict[str, float]) -> Iterator[tuple[str, str]]:
    failed = f"{figures['failed']} failed ({figures['refused']} refused as too many)"
    yield "requests", f"{figures['completed']} answered, {failed}, in {figures['duration']:.1f} s"
    rates = f"{figures['request_throughput']:.2f}, of which {figures['request_goodput']:.2f} within the objectives"
    yield "requests/s", rates
    yield "tokens/s", f"{figures['output_throughput']:.1f}"
    for name, title in (("ttft", "first token"), ("itl", "between tokens"), ("e2el", "whole answer")):
        parts = (f"{label} {figures[f'{label}_{name}_ms']:.1f}" for label in ("median", "p95", "p99"))
        yield f"{title}, ms", ", ".join(parts)


def draw_plot(answers: Sequence[Answer], path: Path) -> None:
    """The share of requests and of tokens that waited no longer than a time."""
    from sparsejax.evaluation.plot import load_pyplot

    good = [answer for answer in answers if answer.good]
    lines = {
        "first token": [answer.times[0] for answer in good],
        "between tokens": [gap for answer in good for gap in answer.gaps],
    }
    figure, axes = load_pyplot().subplots(figsize=(6, 4))
    for title, values in lines.items():
        ordered = sorted(1000 * value for value in values)
        axes.step(ordered, [(place + 1) / len(ordered) for place in range(len(ordered))], where="post", label=title)
    axes.set(xlabel="milliseconds", ylabel="share that waited no longer", xscale="log", ylim=(0, 1.02))
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
