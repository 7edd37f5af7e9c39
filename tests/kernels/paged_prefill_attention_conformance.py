"""What every backend of `paged_prefill_attention` must do."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels import paged_prefill_attention

from . import oracle
from .attention_conformance import SHARED, AttentionConformance
from .cases import Spec, build

PLAIN = Spec("many rows", (20, 5, 33, 64), (20, 5, 3, 16), head_dim=128, page_size=32)
SPECS = (
    PLAIN,
    Spec("one row from zero", (33,), (33,), dtype="bf16"),
    Spec("one row later", (70,), (21,), head_dim=80),
    Spec("empty rows", (0, 40, 17, 0), (0, 7, 0, 0), spare_tokens=9),
    Spec("decode rows and a chunk", (90, 31, 1, 130), (1, 1, 1, 67), dtype="bf16", spare_tokens=3),
    Spec("long", (700, 3), (70, 3), page_size=32, head_dim=16),
    *SHARED,
)


class PagedPrefillAttentionConformance(AttentionConformance):
    """Subclass it with the name of a backend."""

    op = paged_prefill_attention
    arguments = ("q", "k_pages", "v_pages", "page_ids", "counts", "lengths", "query_starts")
    oracle = oracle.prefill
    plain = PLAIN

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_agrees_with_the_oracle(self, spec: Spec):
        self.agrees(spec)

    def test_cuts_into_chunks_agree(self):
        dtype = self.supports_dtypes[0]
        spec = Spec("cut", (150,), (150,), page_size=32, head_dim=128, dtype=dtype)
        case = build(spec)
        whole, _ = self.attend(case)
        for cut in (1, 32, 63, 149):
            # The same shapes serve both parts: the tokens that a part does not own come last.
            first, _ = self.attend(
                case, lengths=np.asarray([cut], np.int32), query_starts=np.asarray([0, cut], np.int32)
            )
            second, _ = self.attend(
                case, q=np.roll(case.q, -cut, axis=0), query_starts=np.asarray([0, 150 - cut], np.int32)
            )
            pieces = np.concatenate([first[:cut], second[: 150 - cut]])
            self.close(pieces, whole.astype(np.float64), spec.dtype)
