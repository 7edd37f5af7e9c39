"""What every backend of `window_scores` must do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import window_scores

from . import oracle, sparse_oracle
from .attention_mass_conformance import MassSpec
from .cases import Case, build
from .conformance import Conformance


@dataclasses.dataclass(frozen=True)
class WindowSpec(MassSpec):
    """A case with the last `size` queries of each row."""

    group: str = "mean"
    size: int = 8


SPECS = (
    WindowSpec("one query", (40,), size=1),
    WindowSpec("odd lengths", (9, 33, 17, 64), head_dim=128, page_size=32),
    WindowSpec("rows shorter than the window", (5, 0, 1, 300), size=40, dtype="bf16"),
    WindowSpec("mha", (31, 70), heads=4, kv_heads=4, head_dim=80, group="sum"),
    WindowSpec("wide groups", (145, 12), heads=8, kv_heads=1, head_dim=128, dtype="bf16", group="max"),
    WindowSpec("long", (700, 50), page_size=32, head_dim=16, size=32),
    WindowSpec("head lists with gaps", (240, 100), head_lists=True, gaps=True, page_size=32, dtype="bf16"),
    WindowSpec("options", (120, 64), window=30, soft_cap=2.0, scale=0.5, sinks=True),
)


class WindowScoresConformance(Conformance):
    """Subclass it with the name of a backend."""

    def inputs(self, spec: WindowSpec) -> tuple[Case, np.ndarray]:
        """A prefill case of the queries that exist, and all W queries of its rows, the others NaN."""
        queries = tuple(min(spec.size, length) for length in spec.lengths)
        case = build(dataclasses.replace(spec, queries=queries))
        q = np.full((len(queries), spec.size, *case.q.shape[1:]), np.nan, np.float32).astype(case.q.dtype)
        for row, (start, stop) in enumerate(zip(case.query_starts, case.query_starts[1:], strict=False)):
            q[row, spec.size - (stop - start) :] = case.q[start:stop]
        return case, q

    def scores(self, case: Case, q: np.ndarray, spec: WindowSpec, **changed):
        """The op on the arrays of `case`."""
        lists = [changed.get(name, getattr(case, name)) for name in ("page_ids", "counts", "lengths")]
        return self.run(window_scores, q, case.k_pages, *lists, **case.options(), group=spec.group)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: WindowSpec):
        case, q = self.inputs(spec)
        if self.declines(spec, lambda: self.scores(case, q, spec)):
            return
        got = self.scores(case, q, spec)
        _, lse = oracle.prefill(case)
        expected = sparse_oracle.mass(case, case.k_pages.astype(np.float64), lse, spec.group, True)
        assert got.dtype == np.float32
        self.close(got, expected, spec.dtype)

    def test_rows_do_not_depend_on_their_neighbours(self):
        spec = WindowSpec("neighbours", (90, 300, 7), page_size=32, dtype="bf16", head_dim=128)
        case, q = self.inputs(spec)
        if self.declines(spec, lambda: self.scores(case, q, spec)):
            return
        together = self.scores(case, q, spec)
        for row in range(3):
            alone = np.where(np.arange(3) == row, case.lengths, 0).astype(np.int32)
            counts = np.where(np.arange(3)[:, None] == row, case.counts, 0).astype(np.int32)
            got = self.scores(case, q, spec, lengths=alone, counts=counts)
            np.testing.assert_array_equal(got[row], together[row])
