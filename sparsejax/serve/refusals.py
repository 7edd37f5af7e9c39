"""Refusals of servers that are full: there are many, so they share a line in the log."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

log = logging.getLogger("sparsejax.access")
LOG_SECONDS = 1.0


class RefusalLog:
    """Counts what was refused before it was read, and logs it once a second while there is any. For one event loop."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, route: str) -> None:
        if not self._counts:
            asyncio.get_running_loop().call_later(LOG_SECONDS, self._write)
        self._counts[route] += 1

    def _write(self) -> None:
        counts, self._counts = self._counts, Counter()
        log.info("refused", extra={"fields": {"seconds": LOG_SECONDS, "requests": dict(counts)}})
