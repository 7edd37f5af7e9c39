"""What every backend of `paged_prefill_attention` must do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import paged_prefill_attention

from . import oracle
from .cases import Case, Spec, build
from .conformance import Conformance

SPECS = (
    Spec("one token", (1,), (1,)),
    Spec("one row from zero", (33,), (33,), dtype="bf16"),
    Spec("one row later", (70,), (21,), head_dim=80),
    Spec("many rows", (20, 5, 33, 64), (20, 5, 3, 16), head_dim=128, page_size=32),
    Spec("empty rows", (0, 40, 17, 0), (0, 7, 0, 0), spare_tokens=9),
    Spec("decode rows and a chunk", (90, 31, 1, 130), (1, 1, 1, 67), dtype="bf16", spare_tokens=3),
    Spec("mha", (31, 50), (10, 50), heads=4, kv_heads=4, dtype="bf16"),
    Spec("mha f32", (9, 50), (2, 6), heads=3, kv_heads=3, head_dim=16),
    Spec("wide groups", (45, 12), (9, 12), heads=8, kv_heads=1, head_dim=128, dtype="bf16"),
    Spec("page 64", (200, 63, 65), (11, 4, 65), page_size=64, head_dim=128, dtype="bf16"),
    Spec("long", (700, 3), (70, 3), page_size=32, head_dim=16),
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


class PagedPrefillAttentionConformance(Conformance):
    """Subclass it with the name of a backend."""

    def prefill(self, case: Case, **changed):
        """The op on the arrays of `case`: (out, lse)."""
        arrays = {
            name: changed.get(name, getattr(case, name))
            for name in ("q", "k_pages", "v_pages", "page_ids", "counts", "lengths", "query_starts")
        }
        return self.run(paged_prefill_attention, *arrays.values(), **case.options(), return_lse=True)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: Spec):
        case = build(spec)
        if self.declines(spec, lambda: self.prefill(case)):
            return
        out, lse = self.prefill(case)
        expected, expected_lse = oracle.prefill(case)
        assert out.dtype == case.q.dtype and lse.dtype == np.float32
        self.close(out, expected, spec.dtype)
        self.close(lse, expected_lse, spec.dtype, "lse")

    def test_leaves_out_the_lse_unless_asked(self):
        spec = dataclasses.replace(SPECS[3], dtype=self.supports_dtypes[0])
        case = build(spec)
        out = self.run(
            paged_prefill_attention,
            case.q,
            case.k_pages,
            case.v_pages,
            case.page_ids,
            case.counts,
            case.lengths,
            case.query_starts,
        )
        self.close(out, oracle.prefill(case)[0], spec.dtype)

    def test_cuts_into_chunks_agree(self):
        dtype = self.supports_dtypes[0]
        spec = Spec("cut", (150,), (150,), page_size=32, head_dim=128, dtype=dtype)
        case = build(spec)
        whole, _ = self.prefill(case)
        for cut in (1, 32, 63, 149):
            # The same shapes serve both parts: the tokens that a part does not own come last.
            first, _ = self.prefill(
                case, lengths=np.asarray([cut], np.int32), query_starts=np.asarray([0, cut], np.int32)
            )
            second, _ = self.prefill(
                case, q=np.roll(case.q, -cut, axis=0), query_starts=np.asarray([0, 150 - cut], np.int32)
            )
            pieces = np.concatenate([first[:cut], second[: 150 - cut]])
            self.close(pieces, whole.astype(np.float64), spec.dtype)
