"""Ctrl-C between steps instead of inside one, so that the engine stays usable."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Holds back the first SIGINT; the yielded function raises it as KeyboardInterrupt at a safe point.

    A step donates the device state: an interrupt between the call and the assignment of its result would lose
    every sequence's pages. A second SIGINT is raised at once, wherever the program is. Outside the main thread,
    where Python delivers no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else handles it already
        yield lambda: None
        return
    received = False

    def hold(number: int, frame: Any) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = True

    def check() -> None:
        if received:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hold)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
