"""The caller's side of a contender, and the machine's load while it runs."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class ContenderFailed(RuntimeError):
    """A contender's process ended or reported an error; the message carries what it said."""


class Contender:
    """A contender in its own process, asked through JSON lines. A context manager that ends the process."""

    def __init__(
        self, name: str, python: str, script: str, settings: dict[str, Any], root: Path | None = None
    ):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        env = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        if root is not None:
            env["PYTHONPATH"] = str(root)  # the checkout beside this file is measured, installed or not
        self.process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )
        self.loaded = self.ask({"op": "load", **settings})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            ContenderFailed: the process ended, or the contender reported an error.
        """
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer below tells why
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended\n{self.tail()}"}
        if "error" in answer:
            raise ContenderFailed(f"{self.name}: {answer['error']}")
        return answer

    def run(self, requests: list, waiting: Sequence[Contender] = ()) -> dict[str, Any]:
        """Serve the requests once; the answer gains the shares of the processors that the contenders in
        ``waiting`` and everybody else used meanwhile.
        """
        pids = [other.process.pid for other in waiting if other is not self]
        before = Load.now(self.process.pid, pids)
        answer = self.ask({"op": "run", "requests": requests})
        answer |= Load.now(self.process.pid, pids).since(before)
        answer["load_average"] = os.getloadavg()[0]
        return answer

    def tail(self) -> str:
        self.log.seek(0)
        return self.log.read()[-2000:]

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@dataclass(frozen=True)
class Load:
    """Clock ticks: of all processors (busy, total), of one process with this one, and of the idle ones."""

    busy: int
    total: int
    own: int
    waiting: int

    @classmethod
    def now(cls, pid: int, waiting: Sequence[int] = ()) -> Load:
        """The ticks so far; all zero where the system does not tell (off Linux)."""
        try:
            first = Path("/proc/stat").read_text().splitlines()[0]
            ticks = [int(field) for field in first.split()[1:9]]
            own = sum(map(ticks_of, {pid, os.getpid()}))
            return cls(sum(ticks) - ticks[3] - ticks[4], sum(ticks), own, sum(map(ticks_of, waiting)))
        except OSError:
            return cls(0, 0, 0, 0)

    def since(self, before: Load) -> dict[str, float | None]:
        """Shares of the machine's processors since ``before``; None where the system does not tell."""
        total = self.total - before.total
        if total <= 0:
            return {"waiting_cpu": None, "foreign_cpu": None}
        waiting = self.waiting - before.waiting
        foreign = (self.busy - before.busy) - (self.own - before.own) - waiting
        return {"waiting_cpu": waiting / total, "foreign_cpu": max(0.0, foreign / total)}


def ticks_of(pid: int) -> int:
    """User and system clock ticks of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
