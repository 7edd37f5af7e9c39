"""One int32 buffer per step: named host views to fill, the same names as arrays inside the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Named int32 fields laid end to end, so that a step needs one upload."""

    fields: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for _, shape in self.fields)

    def views(self, buffer):
        """``{name: view}`` of a NumPy buffer, or ``{name: slice}`` of a traced array, of length `size`."""
        start, views = 0, {}
        for name, shape in self.fields:
            stop = start + math.prod(shape)
            views[name] = buffer[start:stop].reshape(shape)
            start = stop
        return views

    def empty(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A zeroed host buffer and its views."""
        buffer = np.zeros(self.size, np.int32)
        return buffer, self.views(buffer)
