"""What every backend of `quantized_decode_attention` must do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_kernels import quantized_decode_attention

from . import oracle
from .cases import Case
from .coded import Coded, CodedSpec, build_coded
from .conformance import Conformance

SPECS = (
    CodedSpec("one token", (1,), codec="int8"),
    CodedSpec("one full page", (16,), codec="int4", dtype="bf16", scale_dtype="bf16"),
    CodedSpec("int8", (5, 33, 17, 64), codec="int8", head_dim=128, page_size=32),
    CodedSpec("int4", (5, 33, 17, 64), codec="int4", head_dim=128, page_size=32),
    CodedSpec("fp8", (5, 33, 17, 64), codec="fp8", head_dim=128, page_size=32, dtype="bf16"),
    CodedSpec("empty rows", (0, 40, 0), codec="int4", head_dim=80),
    CodedSpec("mha int8", (31, 70), codec="int8", heads=4, kv_heads=4, dtype="bf16", scale_dtype="bf16"),
    CodedSpec("page 64", (200, 63, 65), codec="int4", page_size=64, head_dim=128, dtype="bf16"),
    CodedSpec("long", (1100, 3), codec="int4", page_size=32, dtype="bf16", scale_dtype="bf16", heads=6, kv_heads=1),
    CodedSpec("head lists with gaps", (640, 200), codec="int8", head_lists=True, gaps=True, page_size=32),
    CodedSpec("window and gaps", (300, 64), codec="int4", window=100, gaps=True, head_lists=True),
    CodedSpec("soft cap and sinks", (50, 21, 0), codec="int8", soft_cap=2.0, scale=0.5, sinks=True),
    CodedSpec("side by side int8", (50, 21), codec="int8", side_by_side=True, scales_padding=48),
    CodedSpec(
        "everything",
        (220, 37, 0, 130),
        codec="int4",
        window=90,
        soft_cap=5.0,
        sinks=True,
        gaps=True,
        head_lists=True,
        side_by_side=True,
        scales_padding=96,
        dtype="bf16",
        scale_dtype="bf16",
    ),
)


class QuantizedDecodeAttentionConformance(Conformance):
    """Subclass it with the name of a backend."""

    supports_codecs: tuple[str, ...] = ("int8", "fp8", "int4")

    def supports(self, spec: CodedSpec) -> bool:
        return super().supports(spec) and spec.codec in self.supports_codecs

    def decode(self, case: Case, coded: Coded, **changed):
        """The op on coded pools and the lists of `case`: (out, lse)."""
        lists = [changed.get(name, getattr(case, name)) for name in ("page_ids", "counts", "lengths")]
        pools = (coded.k_codes, coded.v_codes, coded.scales)
        return self.run(
            quantized_decode_attention, case.q, *pools, *lists, **case.options(), return_lse=True
        )

    def agrees(self, spec: CodedSpec) -> None:
        """Requires what the oracle gives, or a decline where the backend does not serve `spec`."""
        case, coded = build_coded(spec)
        if self.declines(spec, lambda: self.decode(case, coded)):
            return
        out, lse = self.decode(case, coded)
        exact = dataclasses.replace(case, k_pages=coded.keys, v_pages=coded.values)
        expected, expected_lse = oracle.decode(exact)
        assert out.dtype == case.q.dtype and lse.dtype == np.float32
        self.close(out, expected, spec.dtype)
        self.close(lse, expected_lse, spec.dtype, "lse")

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: CodedSpec):
        self.agrees(spec)

    def test_rows_do_not_depend_on_their_neighbours(self):
        spec = CodedSpec("neighbours", (90, 300, 7), codec="int4", page_size=32, dtype="bf16", head_dim=128)
        case, coded = build_coded(spec)
        if self.declines(spec, lambda: self.decode(case, coded)):
            return
        together, _ = self.decode(case, coded)
        for row in range(3):
            alone = np.where(np.arange(3) == row, case.lengths, 0).astype(np.int32)
            counts = np.where(np.arange(3)[:, None] == row, case.counts, 0).astype(np.int32)
            out, _ = self.decode(case, coded, lengths=alone, counts=counts)
            np.testing.assert_array_equal(out[row], together[row])
