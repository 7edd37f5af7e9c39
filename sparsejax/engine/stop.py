"""Finding stop strings in text that arrives in pieces, holding back no more than could be one's beginning."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Releases fed text up to the first stop string. Results do not depend on how the text was cut.

    The first match is the one that ends first; of several ending there, the one that starts first.

    Attributes:
        matched: the stop string found, or None. Nothing is released after a match.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._include = include
        self._pending = ""  # fed, not yet released
        self._immune = 0  # leading characters of pending in which no match may end

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Add text, return what can be released. With ``armed=False`` no match may end inside this text."""
        if self.matched is not None or not self._stops:
            return "" if self.matched is not None else text
        pending = self._pending + text
        if not armed:
            self._immune = len(pending)
        found = self._find(pending)
        if found is not None:
            start, self.matched = found
            self._pending = ""
            return pending[: start + len(self.matched)] if self._include else pending[:start]
        cut = len(pending) - self._possible_beginning(pending)
        self._pending = pending[cut:]
        self._immune = 0
        return pending[:cut]

    def would_match(self, text: str) -> bool:
        """Whether feeding ``text`` would complete a stop string."""
        return self.matched is None and self._find(self._pending + text) is not None

    def flush(self) -> str:
        """Release what was held back; the text has ended."""
        text, self._pending, self._immune = self._pending, "", 0
        return text

    def _find(self, text: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None  # (end, start, stop)
        for stop in self._stops:
            start = text.find(stop, max(self._immune - len(stop) + 1, 0))
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else best[1:]

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for size in range(longest, 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
