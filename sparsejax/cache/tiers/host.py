"""The warm tier: pages in main memory, as many as a budget of bytes holds, the one used last longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

import numpy as np


class Payload(Protocol):
    """The bytes of one page of all layers: an array of NumPy, or what turns into one where bytes are asked for."""

    nbytes: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...


class HostTier:
    """Least recently used first. Not safe for several threads: `TieredStore` holds the lock."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._pages: OrderedDict[bytes, Payload] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, hash: bytes) -> bool:
        return hash in self._pages

    def get(self, hash: bytes) -> Payload | None:
        """The page, which counts as used now."""
        payload = self._pages.get(hash)
        if payload is not None:
            self._pages.move_to_end(hash)
        return payload

    def put(self, hash: bytes, payload: Payload) -> list[tuple[bytes, Payload]]:
        """Takes a page in.

        Returns:
            the pages that had to go for it: the page itself, if it alone is more than the budget.
        """
        if hash in self._pages:
            self._pages.move_to_end(hash)
            return []
        self._pages[hash] = payload
        self.bytes += payload.nbytes
        gone = []
        while self.bytes > self.max_bytes:
            gone.append(self._pages.popitem(last=False))
            self.bytes -= gone[-1][1].nbytes
        return gone

    def discard(self, hash: bytes) -> None:
        """Forgets a page, if it is here."""
        if (payload := self._pages.pop(hash, None)) is not None:
            self.bytes -= payload.nbytes

    def clear(self) -> list[tuple[bytes, Payload]]:
        """Gives up every page, the one used last longest ago first."""
        gone = list(self._pages.items())
        self._pages.clear()
        self.bytes = 0
        return gone
