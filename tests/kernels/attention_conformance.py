"""What every backend of attention over dense pages must do, and cases that decode and prefill share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .cases import Case, Spec, build
from .conformance import Conformance

# With chunks; rows have one query each where these are left out.
SHARED = (
    Spec("one token", (1,), (1,)),
    Spec("mha", (31, 70), (10, 50), heads=4, kv_heads=4, dtype="bf16"),
    Spec("mha f32", (9, 50), (2, 6), heads=3, kv_heads=3, head_dim=16),
    Spec("wide groups", (45, 12), (9, 12), heads=8, kv_heads=1, head_dim=128, dtype="bf16"),
    Spec("page 64", (200, 63, 65), (11, 4, 65), page_size=64, head_dim=128, dtype="bf16"),
    Spec("head lists", (80, 33), (12, 33), head_lists=True),
    Spec("gaps", (160, 90, 16), (9, 20, 16), gaps=True, dtype="bf16"),
    Spec("head lists with gaps", (640, 200), (8, 30), head_lists=True, gaps=True, head_dim=128, page_size=32),
    Spec("window", (100, 12, 33), (40, 12, 1), window=24, head_dim=80),
    Spec("window of one", (40, 1), (5, 1), window=1),
    Spec("window in a long row", (1300,), (6,), window=40, head_dim=16),
    Spec("window and gaps", (300, 64), (70, 5), window=100, gaps=True, head_lists=True),
    Spec("soft cap", (50, 21), (4, 21), soft_cap=2.0, scale=0.5),
    Spec("sinks", (50, 21, 0), (13, 2, 0), sinks=True, spare_tokens=2),
    Spec(
        "everything",
        (220, 37, 0, 130),
        (70, 1, 0, 30),
        spare_tokens=5,
        window=90,
        soft_cap=5.0,
        sinks=True,
        gaps=True,
        head_lists=True,
        dtype="bf16",
    ),
)


def of_rows(specs: tuple[Spec, ...]) -> tuple[Spec, ...]:
    """The same cases with one query per row."""
    return tuple(dataclasses.replace(spec, queries=None, spare_tokens=0) for spec in specs)


class AttentionConformance(Conformance):
    """Base of the classes of decode and prefill, which give the op, its arrays and its oracle."""

    op: Callable[..., Any]
    arguments: tuple[str, ...]
    oracle: Callable[[Case], tuple[np.ndarray, np.ndarray]]
    plain: Spec  # a usual case

    def attend(self, case: Case, *, return_lse: bool = True, **changed: Any):
        """The op on the arrays of `case`: (out, lse), or out alone."""
        arrays = [changed.get(name, getattr(case, name)) for name in self.arguments]
        return self.run(type(self).op, *arrays, **case.options(), return_lse=return_lse)

    def agrees(self, spec: Spec) -> None:
        """Requires what the oracle gives, or a decline where the backend does not serve `spec`."""
        case = build(spec)
        if self.declines(spec, lambda: self.attend(case)):
            return
        out, lse = self.attend(case)
        expected, expected_lse = type(self).oracle(case)
        assert out.dtype == case.q.dtype and lse.dtype == np.float32
        self.close(out, expected, spec.dtype)
        self.close(lse, expected_lse, spec.dtype, "lse")

    def test_leaves_out_the_lse_unless_asked(self):
        spec = dataclasses.replace(self.plain, dtype=self.supports_dtypes[0])
        case = build(spec)
        self.close(self.attend(case, return_lse=False), type(self).oracle(case)[0], spec.dtype)
