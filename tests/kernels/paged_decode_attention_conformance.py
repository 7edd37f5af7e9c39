"""What every backend of `paged_decode_attention` must do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import paged_decode_attention

from . import oracle
from .cases import Case, Spec, build
from .conformance import Conformance

SPECS = (
    Spec("one token", (1,)),
    Spec("one full page", (16,), dtype="bf16"),
    Spec("odd lengths", (5, 33, 17, 64), head_dim=128, page_size=32),
    Spec("empty rows", (0, 40, 0), head_dim=80),
    Spec("mha", (31, 70), heads=4, kv_heads=4, dtype="bf16"),
    Spec("mha f32", (9, 50), heads=3, kv_heads=3, head_dim=16),
    Spec("wide groups", (45, 12), heads=8, kv_heads=1, head_dim=128, dtype="bf16"),
    Spec("page 64", (200, 63, 65), page_size=64, head_dim=128, dtype="bf16"),
    Spec("skewed", (700, 3, 20), page_size=32, head_dim=16),
    Spec("long bf16", (1100, 90), page_size=32, dtype="bf16", heads=6),
    Spec("head lists", (80, 33), head_lists=True, kv_heads=2),
    Spec("gaps", (160, 90, 16), gaps=True, dtype="bf16"),
    Spec("head lists with gaps", (640, 200), head_lists=True, gaps=True, head_dim=128, page_size=32),
    Spec("window", (100, 12, 33), window=24, head_dim=80),
    Spec("window of one", (40, 1), window=1),
    Spec("window in a long row", (1300,), window=40, page_size=16, head_dim=16),
    Spec("window and gaps", (300, 64), window=100, gaps=True, head_lists=True),
    Spec("soft cap", (50, 21), soft_cap=2.0, scale=0.5),
    Spec("sinks", (50, 21, 0), sinks=True),
    Spec(
        "everything",
        (220, 37, 0, 130),
        window=90,
        soft_cap=5.0,
        sinks=True,
        gaps=True,
        head_lists=True,
        dtype="bf16",
    ),
)


class PagedDecodeAttentionConformance(Conformance):
    """Subclass it with the name of a backend."""

    def decode(self, case: Case, **changed):
        """The op on the arrays of `case`: (out, lse)."""
        arrays = {
            name: changed.get(name, getattr(case, name))
            for name in ("q", "k_pages", "v_pages", "page_ids", "counts", "lengths")
        }
        return self.run(paged_decode_attention, *arrays.values(), **case.options(), return_lse=True)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: Spec):
        case = build(spec)
        if self.declines(spec, lambda: self.decode(case)):
            return
        out, lse = self.decode(case)
        expected, expected_lse = oracle.decode(case)
        assert out.dtype == case.q.dtype and lse.dtype == np.float32
        self.close(out, expected, spec.dtype)
        self.close(lse, expected_lse, spec.dtype, "lse")

    def test_leaves_out_the_lse_unless_asked(self):
        spec = dataclasses.replace(SPECS[2], dtype=self.supports_dtypes[0])
        case = build(spec)
        out = self.run(
            paged_decode_attention,
            case.q,
            case.k_pages,
            case.v_pages,
            case.page_ids,
            case.counts,
            case.lengths,
        )
        self.close(out, oracle.decode(case)[0], spec.dtype)

    def test_rows_do_not_depend_on_their_neighbours(self):
        case = build(Spec("neighbours", (90, 300, 7), page_size=32, dtype="bf16", head_dim=128))
        together, _ = self.decode(case)
        for row in range(3):
            alone = np.where(np.arange(3) == row, case.lengths, 0).astype(np.int32)
            counts = np.where(np.arange(3)[:, None] == row, case.counts, 0).astype(np.int32)
            out, _ = self.decode(case, lengths=alone, counts=counts)
            np.testing.assert_array_equal(out[row], together[row])
