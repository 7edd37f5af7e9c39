"""Processes that end while a thread of theirs is inside the compiler or a step: with a status, not a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LOADING = """
import atexit, threading, sys
import sparsejax.serve.service as service
from sparsejax.cli import main

begun = service.Service.start
def start(self):
    begun(self)
    print("loading", flush=True)
service.Service.start = start
made = service.Service.__init__
def init(self, config, limits):
    made(self, config, limits, load=threading.Event().wait)
service.Service.__init__ = init
atexit.register(print, "the interpreter shuts down")
sys.exit(main(sys.argv[1:]))
"""

RUNNING = """
import atexit, asyncio, sys
from tests.engine.models import tiny_engine
from sparsejax import SamplingParams
from sparsejax.engine.async_engine import AsyncEngine

made = []
atexit.register(lambda: print("alive" if made[0]._thread.is_alive() else "ended", flush=True))
made.append(AsyncEngine(engine=tiny_engine()))

async def one():
    async for _ in made[0].generate([1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True)):
        sys.exit(3)

asyncio.run(one())
"""


def python(code: str, *argv: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *argv], env=env, stdout=subprocess.PIPE, text=True)


def test_a_signal_while_the_model_is_loading_ends_the_process():
    for command in ("serve", "grpc"):
        with python(LOADING, command, "--port", "0") as server:
            try:
                assert server.stdout.readline() == "loading\n"
                server.send_signal(signal.SIGTERM)
                assert server.communicate(timeout=30)[0] == ""
                assert server.returncode == 0
            finally:
                server.kill()


def test_the_thread_of_an_engine_ends_before_the_interpreter():
    with python(RUNNING) as script:
        assert script.communicate(timeout=120)[0] == "ended\n"
        assert script.returncode == 3
