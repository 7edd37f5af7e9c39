"""What every backend of `paged_decode_attention` must do."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels import paged_decode_attention

from . import oracle
from .attention_conformance import SHARED, AttentionConformance, of_rows
from .cases import Spec, build

PLAIN = Spec("odd lengths", (5, 33, 17, 64), head_dim=128, page_size=32)
SPECS = (
    PLAIN,
    Spec("one full page", (16,), dtype="bf16"),
    Spec("empty rows", (0, 40, 0), head_dim=80),
    Spec("skewed", (700, 3, 20), page_size=32, head_dim=16),
    Spec("long bf16", (1100, 90), page_size=32, dtype="bf16", heads=6),
    *of_rows(SHARED),
)


class PagedDecodeAttentionConformance(AttentionConformance):
    """Subclass it with the name of a backend."""

    op = paged_decode_attention
    arguments = ("q", "k_pages", "v_pages", "page_ids", "counts", "lengths")
    oracle = oracle.decode
    plain = PLAIN

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: Spec):
        self.agrees(spec)

    def test_rows_do_not_depend_on_their_neighbours(self):
        case = build(Spec("neighbours", (90, 300, 7), page_size=32, dtype="bf16", head_dim=128))
        together, _ = self.attend(case)
        for row in range(3):
            alone = np.where(np.arange(3) == row, case.lengths, 0).astype(np.int32)
            counts = np.where(np.arange(3)[:, None] == row, case.counts, 0).astype(np.int32)
            out, _ = self.attend(case, lengths=alone, counts=counts)
            np.testing.assert_array_equal(out[row], together[row])
