"""What every backend of `quantized_prefill_attention` must do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import quantized_prefill_attention

from . import oracle
from .cases import Case
from .coded import Coded, CodedSpec, build_coded
from .conformance import Conformance

SPECS = (
    CodedSpec("nothing before", (9,), (9,), codec="int8"),
    CodedSpec("from zero", (70,), (70,), codec="int4", dtype="bf16", scale_dtype="bf16"),
    CodedSpec("int8", (20, 5, 33, 64), (20, 5, 3, 16), codec="int8", head_dim=128, page_size=32),
    CodedSpec("fp8", (90, 31, 1, 130), (1, 1, 1, 67), codec="fp8", dtype="bf16", spare_tokens=3),
    CodedSpec("empty rows", (0, 40, 17, 0), (0, 7, 0, 0), codec="int4", head_dim=80, spare_tokens=9),
    CodedSpec("mha", (31, 50), (10, 50), codec="int8", heads=4, kv_heads=4, dtype="bf16"),
    CodedSpec("long", (1100, 3), (70, 3), codec="int8", page_size=32, head_dim=16),
    CodedSpec("head lists with gaps", (640, 200), (8, 30), codec="int8", head_lists=True, gaps=True, page_size=32),
    CodedSpec("window", (100, 12, 33), (40, 12, 1), codec="int8", window=24, head_dim=80),
    CodedSpec("window in a long row", (1300,), (6,), codec="int4", window=40, head_dim=16),
    CodedSpec("soft cap and sinks", (50, 21, 0), (13, 21, 0), codec="int8", soft_cap=2.0, scale=0.5, sinks=True),
    CodedSpec("side by side", (50, 21), (4, 21), codec="int4", side_by_side=True, scales_padding=96),
    CodedSpec(
        "everything",
        (220, 37, 0, 130),
        (70, 1, 0, 30),
        codec="int4",
        spare_tokens=5,
        window=90,
        soft_cap=5.0,
        sinks=True,
        gaps=True,
        head_lists=True,
        dtype="bf16",
        scale_dtype="bf16",
    ),
)


def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Attention of each token over a list that ends before its own page."""
    out, lse = np.zeros(case.q.shape), np.full(case.q.shape[:2], oracle.HIDDEN)
    entries = np.arange(case.page_ids.shape[2])
    logical = np.broadcast_to(entries, case.page_ids.shape) if case.logical_ids is None else case.logical_ids
    for row, (start, stop) in enumerate(zip(case.query_starts, case.query_starts[1:], strict=False)):
        for token in range(start, stop):
            position = case.lengths[row] - (stop - token)
            before = (entries < case.counts[..., None]) & (logical < position // case.k_pages.shape[2])
            earlier = dataclasses.replace(case, counts=before.sum(-1))
            out[token], lse[token] = oracle.attend_one(earlier, row, case.q[token], position)
    return out, lse


class QuantizedPrefillAttentionConformance(Conformance):
    """Subclass it with the name of a backend."""

    def prefill(self, case: Case, coded: Coded, **changed):
        """The op on coded pools and the lists of `case`: (out, lse)."""
        names = ("page_ids", "counts", "lengths", "query_starts")
        lists = [changed.get(name, getattr(case, name)) for name in names]
        pools = (coded.k_codes, coded.v_codes, coded.scales)
        q = changed.get("q", case.q)
        return self.run(quantized_prefill_attention, q, *pools, *lists, **case.options(), return_lse=True)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: CodedSpec):
        case, coded = build_coded(spec)
        if self.declines(spec, lambda: self.prefill(case, coded)):
            return
        out, lse = self.prefill(case, coded)
        wanted, wanted_lse = expected(dataclasses.replace(case, k_pages=coded.keys, v_pages=coded.values))
        assert out.dtype == case.q.dtype and lse.dtype == np.float32
        self.close(out, wanted, spec.dtype)
        self.close(lse, wanted_lse, spec.dtype, "lse")

    def test_cuts_into_chunks_agree(self):
        dtype = self.supports_dtypes[0]
        spec = CodedSpec("cut", (150,), (150,), codec="int4", page_size=32, head_dim=128, dtype=dtype)
        case, coded = build_coded(spec)
        whole, _ = self.prefill(case, coded)
        for cut in (1, 32, 63, 149):
            # The same shapes serve both parts: the tokens that a part does not own come last.
            first, _ = self.prefill(
                case, coded, lengths=np.asarray([cut], np.int32), query_starts=np.asarray([0, cut], np.int32)
            )
            second, _ = self.prefill(
                case, coded, q=np.roll(case.q, -cut, axis=0), query_starts=np.asarray([0, 150 - cut], np.int32)
            )
            pieces = np.concatenate([first[:cut], second[: 150 - cut]])
            self.close(pieces, whole.astype(np.float64), spec.dtype)
