"""What every backend of `attention_mass` must do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import attention_mass

from . import oracle, sparse_oracle
from .cases import Case, build
from .coded import CodedSpec, build_coded
from .conformance import Conformance


@dataclasses.dataclass(frozen=True)
class MassSpec(CodedSpec):
    """A case with what is asked of it; `codec` "" means dense keys, `queries` chunks of several queries."""

    codec: str = ""
    group: str = "sum"
    per_token: bool = False


SPECS = (
    MassSpec("odd lengths", (1, 33, 17, 64), head_dim=128, page_size=32, soft_cap=2.0, sinks=True),
    MassSpec("tokens", (5, 33, 64), per_token=True, dtype="bf16"),
    MassSpec("empty rows", (0, 40, 0), head_dim=80, group="max"),
    MassSpec("mha", (31, 70), heads=4, kv_heads=4, dtype="bf16", group="mean"),
    MassSpec("wide groups", (45, 12), heads=8, kv_heads=1, head_dim=128, dtype="bf16", group="max"),
    MassSpec("long tokens", (600, 3, 90), page_size=32, per_token=True, group="max", head_dim=16),
    MassSpec("head lists with gaps", (640, 200), head_lists=True, gaps=True, page_size=32),
    MassSpec("window and gaps", (300, 64), window=100, gaps=True, per_token=True),
    MassSpec("chunks", (33, 20, 0, 70), (33, 3, 0, 21), spare_tokens=3),
    MassSpec("chunks of tokens", (90, 31), (17, 1), group="max", per_token=True, dtype="bf16"),
    MassSpec("chunks, mha and window", (80, 40), (5, 30), heads=3, kv_heads=3, window=24, group="mean"),
    MassSpec("a long chunk", (200,), (150,), page_size=32, head_dim=16, group="max"),
    MassSpec("int4 tokens", (90, 33, 0), codec="int4", page_size=32, per_token=True, head_dim=128),
    MassSpec("fp8 beside values", (70,), codec="fp8", side_by_side=True, scale_dtype="bf16", head_lists=True),
    MassSpec("int8 chunks", (70, 40), (9, 2), codec="int8", gaps=True, group="max"),
)


class AttentionMassConformance(Conformance):
    """Subclass it with the name of a backend."""

    supports_chunks = True
    supports_per_token = True
    supports_codecs: tuple[str, ...] = ("int8", "fp8", "int4")

    def supports(self, spec: MassSpec) -> bool:
        return (
            super().supports(spec)
            and (self.supports_chunks or spec.queries is None)
            and (self.supports_per_token or not spec.per_token)
            and (not spec.codec or spec.codec in self.supports_codecs)
        )

    def mass(self, case: Case, k_pages, scales, lse, spec: MassSpec, **changed):
        """The op on the arrays of `case`."""
        lists = [changed.get(name, getattr(case, name)) for name in ("page_ids", "counts", "lengths")]
        options = {name: value for name, value in case.options().items() if name != "sinks"}
        options |= {"scales": scales, "group": spec.group, "per_token": spec.per_token}
        if case.query_starts is not None:
            options["query_starts"] = case.query_starts
        return self.run(attention_mass, case.q, k_pages, *lists, lse, **options)

    def inputs(self, spec: MassSpec):
        """(case, stored keys, scales, keys in float64, log-sum-exp)."""
        case, coded = build_coded(spec) if spec.codec else (build(spec), None)
        keys = case.k_pages.astype(np.float64) if coded is None else coded.keys
        exact = dataclasses.replace(case, k_pages=keys, v_pages=keys)
        _, lse = (oracle.decode if case.query_starts is None else oracle.prefill)(exact)
        stored, scales = (case.k_pages, None) if coded is None else (coded.k_codes, coded.scales)
        return case, stored, scales, keys, lse.astype(np.float32)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: MassSpec):
        case, stored, scales, keys, lse = self.inputs(spec)
        if self.declines(spec, lambda: self.mass(case, stored, scales, lse, spec)):
            return
        got = self.mass(case, stored, scales, lse, spec)
        assert got.dtype == np.float32
        self.close(got, sparse_oracle.mass(case, keys, lse, spec.group, spec.per_token), spec.dtype)

    def test_all_pages_together_have_the_mass_of_every_query(self):
        spec = MassSpec("whole", (130, 77), dtype="bf16")
        case, stored, scales, _, lse = self.inputs(spec)
        if self.declines(spec, lambda: self.mass(case, stored, scales, lse, spec)):
            return
        total = self.mass(case, stored, scales, lse, spec).sum(-1)
        np.testing.assert_allclose(total, spec.heads / spec.kv_heads, rtol=self.tolerance["bf16"])

    def test_rows_do_not_depend_on_their_neighbours(self):
        spec = MassSpec("neighbours", (90, 300, 7), page_size=32, dtype="bf16", head_dim=128)
        case, stored, scales, _, lse = self.inputs(spec)
        if self.declines(spec, lambda: self.mass(case, stored, scales, lse, spec)):
            return
        together = self.mass(case, stored, scales, lse, spec)
        for row in range(3):
            alone = np.where(np.arange(3) == row, case.lengths, 0).astype(np.int32)
            counts = np.where(np.arange(3)[:, None] == row, case.counts, 0).astype(np.int32)
            got = self.mass(case, stored, scales, lse, spec, lengths=alone, counts=counts)
            np.testing.assert_array_equal(got[row], together[row])
