"""What every backend of `page_scores` must do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import page_scores

from . import sparse_oracle
from .cases import Case, Spec, build
from .conformance import Conformance


@dataclasses.dataclass(frozen=True)
class ScoreSpec(Spec):
    """A case with a way to reduce the group."""

    group: str = "max"


SPECS = (
    ScoreSpec("one page", (5,)),
    ScoreSpec("odd rows", (70, 33, 200), head_dim=128, dtype="bf16"),
    ScoreSpec("empty rows", (0, 40, 0), head_dim=80, group="mean"),
    ScoreSpec("mha", (131, 70), heads=4, kv_heads=4, dtype="bf16"),
    ScoreSpec("mha sum", (90, 50), heads=3, kv_heads=3, head_dim=16, group="sum"),
    ScoreSpec("wide groups", (145, 12), heads=8, kv_heads=1, head_dim=128, dtype="bf16", group="mean"),
    ScoreSpec("head lists", (80, 33), head_lists=True),
    ScoreSpec("many pages", (2100, 3), head_dim=16, heads=6, scale=0.7),
)


def bounds_of(case: Case) -> np.ndarray:
    """Bounds of the pages, NaN where a page has no tokens."""
    keys = case.k_pages.astype(np.float32)
    dead = np.isnan(keys)
    low = np.where(dead, np.inf, keys).min(2)
    high = np.where(dead, -np.inf, keys).max(2)
    bounds = np.concatenate([low, high], axis=-1)
    return np.where(np.isfinite(bounds), bounds, np.nan).astype(case.k_pages.dtype)


class PageScoresConformance(Conformance):
    """Subclass it with the name of a backend."""

    def scores(self, case: Case, bounds: np.ndarray, spec: ScoreSpec, **changed):
        """The op on the lists of `case`."""
        arrays = {name: changed.get(name, getattr(case, name)) for name in ("page_ids", "counts")}
        options = {"group": spec.group, "scale": case.scale}
        return self.run(page_scores, case.q, bounds, *arrays.values(), **options)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: ScoreSpec):
        case = build(spec)
        bounds = bounds_of(case)
        if self.declines(spec, lambda: self.scores(case, bounds, spec)):
            return
        low, high = np.split(bounds, 2, axis=-1)
        expected = sparse_oracle.page_scores(
            case.q, low, high, case.page_ids, case.counts, spec.group, case.scale
        )
        got = self.scores(case, bounds, spec)
        assert got.dtype == np.float32
        self.close(got, expected, spec.dtype)

    def test_bounds_may_be_padded(self):
        spec = SPECS[2]
        case = build(spec)
        low, high = np.split(bounds_of(case), 2, axis=-1)
        padding = np.full((*low.shape[:2], 128 - spec.head_dim), 0, low.dtype)
        padded = np.concatenate([low, padding, high, padding], axis=-1)
        if self.declines(spec, lambda: self.scores(case, padded, spec)):
            return
        expected = sparse_oracle.page_scores(case.q, low, high, case.page_ids, case.counts, spec.group, None)
        self.close(self.scores(case, padded, spec), expected, spec.dtype)

    def test_rows_do_not_depend_on_their_neighbours(self):
        spec = SPECS[1]
        case = build(spec)
        bounds = bounds_of(case)
        if self.declines(spec, lambda: self.scores(case, bounds, spec)):
            return
        together = self.scores(case, bounds, spec)
        for row in range(3):
            counts = np.where(np.arange(3)[:, None] == row, case.counts, 0).astype(np.int32)
            got = self.scores(case, bounds, spec, counts=counts)
            np.testing.assert_array_equal(got[row], together[row])
