"""The Mosaic TPU backends, interpreted, against the oracle; XLA and the reference on pools in TPU layouts."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from pallas_kernels import explain, paged_decode_attention

from . import paged_decode_attention_conformance as decode
from . import paged_prefill_attention_conformance as prefill
from .cases import Case, Spec, build
from .kv_write_conformance import KvWriteConformance
from .tpu_conformance import TpuLayout, quick

# Every head dim, page size and dtype; each value is in one of the quick ones.
SIZES = tuple(
    Spec(f"D{d} P{p} {dtype}", (70, 0, 9), (37, 0, 9), head_dim=d, page_size=p, dtype=dtype)
    for d, p, dtype in itertools.product((64, 80, 96, 128, 192, 256), (16, 32, 64, 128), ("bf16", "f32"))
)
# The same for decode: one query per row.
ROWS = tuple(dataclasses.replace(spec, queries=None) for spec in SIZES)
# More list entries than scalar memory holds at a time, and an empty row between.
LONG = Spec("long lists", (2500, 0, 3000), (20, 0, 9), heads=2, kv_heads=1, dtype="bf16")


class TestMosaicTpuPagedDecodeAttention(TpuLayout, decode.PagedDecodeAttentionConformance):
    @pytest.mark.parametrize(
        "spec",
        quick((*decode.SPECS, *ROWS), "head lists with gaps", "everything", "D96 P64 bf16", "D256 P32 f32"),
    )
    def test_agrees_with_the_oracle(self, spec: Spec):
        super().test_agrees_with_the_oracle(spec)

    @pytest.mark.slow
    def test_leaves_out_the_lse_unless_asked(self):
        super().test_leaves_out_the_lse_unless_asked()


class TestMosaicTpuPagedPrefillAttention(TpuLayout, prefill.PagedPrefillAttentionConformance):
    @pytest.mark.parametrize(
        "spec", quick((*prefill.SPECS, *SIZES, LONG), "everything", "D192 P128 bf16", "D80 P16 f32", "long lists")
    )
    def test_agrees_with_the_oracle(self, spec: Spec):
        super().test_agrees_with_the_oracle(spec)

    @pytest.mark.slow
    def test_leaves_out_the_lse_unless_asked(self):
        super().test_leaves_out_the_lse_unless_asked()


class TestXlaKvWriteInTpuLayouts(TpuLayout, KvWriteConformance):
    backend = "xla"


class TestXlaDecodeInTpuLayouts(TpuLayout, decode.PagedDecodeAttentionConformance):
    backend = "xla"

    @pytest.mark.parametrize("spec", quick(decode.SPECS, "empty rows", "everything"))
    def test_agrees_with_the_oracle(self, spec: Spec):
        super().test_agrees_with_the_oracle(spec)


class TestReferenceDecodeInTpuLayouts(TpuLayout, decode.PagedDecodeAttentionConformance):
    backend = "reference"

    @pytest.mark.parametrize("spec", quick(decode.SPECS, "empty rows", "everything"))
    def test_agrees_with_the_oracle(self, spec: Spec):
        super().test_agrees_with_the_oracle(spec)


@pytest.mark.parametrize(
    ("spec", "reason"),
    (
        (Spec("plain narrow", (20,), head_dim=64), "minor dimension of a TPU pool must be a multiple of 128; got 64"),
        (Spec("page of 8", (20,), head_dim=128, page_size=8), r"page size must be one of \(16, 32, 64, 128\); got 8"),
    ),
    ids=str,
)
def test_declines_pools_that_it_cannot_copy_page_by_page(spec: Spec, reason: str):
    assert re.search(reason, declined(build(spec)))


def test_declines_dtypes_that_it_does_not_read():
    case = build(Spec("half", (20,), head_dim=128))
    case = dataclasses.replace(case, k_pages=case.k_pages.astype("float16"), v_pages=case.v_pages.astype("float16"))
    assert declined(case) == "pool dtype must be bfloat16 or float32; got float16"


def declined(case: Case) -> str:
    """Why the backend declines this case."""
    arrays = (case.q, case.k_pages, case.v_pages, case.page_ids, case.counts, case.lengths)
    _, reasons = explain(paged_decode_attention, *arrays, implementation="mosaic_tpu")
    return reasons["mosaic_tpu"]
