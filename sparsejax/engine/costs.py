"""What bringing a page back costs and what computing it costs, as measured while the engine runs."""

from __future__ import annotations

KEPT = 0.8
"""What earlier pages weigh when others are measured, of what they weighed before."""
FORGET = 0.98
"""A source that was passed over is believed to be a little faster each time, so that it is tried again one day."""


class Costs:
    """Running means of seconds per page. Each page weighs the same: a step of few tokens says little about a page.

    Attributes:
        seconds: to read it from ``"host"`` or ``"disk"``, to ``"load"`` it to the device, to ``"compute"`` it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def note(self, what: str, seconds: float, pages: float) -> None:
        """Takes in that `pages` took `seconds`."""
        earlier = KEPT * self._weights.get(what, 0.0)
        self._weights[what] = earlier + pages
        self.seconds[what] = (earlier * self.seconds.get(what, 0.0) + seconds) / self._weights[what]

    def pays(self, source: str) -> bool:
        """Whether a page is brought back from `source` sooner than it is computed; yes until all of it is measured."""
        try:
            better = self.seconds[source] + self.seconds["load"] < self.seconds["compute"]
        except KeyError:
            return True
        if not better:
            self.seconds[source] *= FORGET
        return better
