"""Intervals of accuracies and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959964


def wilson(right: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share (Wilson 1927); all of [0, 1] where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(
    ours: Sequence[bool], baseline: Sequence[bool], z: float = Z95
) -> tuple[float, float, float]:
    """Difference of two accuracies on the same samples, with an interval: ``(difference, low, high)``.

    The interval is Wald's for matched pairs with half a count added to each cell of the table (Agresti and Min 2005),
    which stays honest where the two never disagree.
    """
    if not ours:
        return 0.0, -1.0, 1.0
    won = sum(one and not other for one, other in zip(ours, baseline, strict=True))
    lost = sum(other and not one for one, other in zip(ours, baseline, strict=True))
    count, a, b = len(ours) + 2, won + 0.5, lost + 0.5
    middle = (a - b) / count
    half = z * math.sqrt(a + b - (a - b) ** 2 / count) / count
    return (won - lost) / len(ours), max(-1.0, middle - half), min(1.0, middle + half)
