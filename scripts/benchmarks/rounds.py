"""Timed rounds: contenders taking turns on the same requests, and a clock that keeps to a limit."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.process import Contender, ContenderFailed
from benchmarks.workload import Workload


@dataclass(frozen=True)
class Run:
    """One timed round of one contender.

    Attributes:
        waiting_cpu, foreign_cpu: shares of the processors that the other contenders, which should be idle,
            and everybody else used meanwhile.
        same_tokens: requests with the tokens of the first contender, of this repetition.
        compiles: programs compiled during the round, where the contender counts them; should be 0.
    """

    contender: str
    repetition: int
    seconds: float
    cpu_seconds: float
    peak_mib: float
    waiting_cpu: float | None
    foreign_cpu: float | None
    load_average: float
    new_tokens: int
    same_tokens: int
    compiles: int | None = None


def one_repetition(
    contenders: list[Contender], load: Workload, repetition: int, label: str
) -> list[dict[str, Any]]:
    """Every contender serves the same requests once; the order rotates so that none is always first.

    Raises:
        ContenderFailed: one broke down, or generated other numbers of tokens than asked for.
    """
    requests = load.make(repetition)
    first = repetition % len(contenders)
    answers = {}
    for contender in contenders[first:] + contenders[:first]:
        answers[contender.name] = answer = contender.run(requests, waiting=contenders)
        given = [len(tokens) for tokens in answer["tokens"]]
        if given != [new for _, new in requests]:
            raise ContenderFailed(f"{contender.name} did not generate what was asked for: {given} tokens")
        progress(f"{label} {repetition + 1}: {contender.name} {answer['seconds']:.2f} s")
    tokens = {name: answer.pop("tokens") for name, answer in answers.items()}
    reference = tokens[contenders[0].name]
    return [
        asdict(
            Run(
                contender=name,
                repetition=repetition,
                new_tokens=sum(new for _, new in requests),
                same_tokens=sum(a == b for a, b in zip(tokens[name], reference, strict=True)),
                **{k: round(v, 4) if isinstance(v, float) else v for k, v in answer.items()},
            )
        )
        for name, answer in answers.items()
    ]


class Clock:
    """Keeps a benchmark of several parts to a number of minutes, and says how long the rest will take."""

    def __init__(self, minutes: float | None = None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.limit = self.end
        self.longest = 0.0

    def share(self, parts: int) -> None:
        """A part begins and ``parts`` are left with it: it may use its share of the time that is left."""
        now = time.monotonic()
        self.limit = None if self.end is None else now + (self.end - now) / parts
        self.longest = 0.0

    def has_time(self, done: int) -> bool:
        """Whether one more repetition fits. The first one of a part always runs."""
        return not done or self.limit is None or time.monotonic() + self.longest <= self.limit

    @contextlib.contextmanager
    def repetition(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.longest = max(self.longest, time.monotonic() - started)

    def outlook(self, left: int) -> str:
        return f"about {self.longest * left / 60:.1f} minutes to go for this dtype"


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
