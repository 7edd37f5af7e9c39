"""Results of the device beside what they should be."""

from __future__ import annotations

from typing import Any

import numpy as np


def compared(got: np.ndarray, expected: np.ndarray, tolerance: float) -> dict[str, Any]:
    """Largest error relative to the largest expected value; raises if it is too large or not a number."""
    got = got.astype(np.float64)
    if not np.isfinite(got).all():
        raise AssertionError(f"{int((~np.isfinite(got)).sum())} of {got.size} values are not finite")
    scale = np.abs(expected).max(initial=1e-30)
    error = float(np.abs(got - expected).max(initial=0) / scale)
    if error > tolerance:
        raise AssertionError(f"relative error {error:.2e} exceeds {tolerance:.0e}")
    return {"max_error": error}
