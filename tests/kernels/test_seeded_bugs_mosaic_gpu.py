"""One seeded bug per kind in the Mosaic GPU kernels; the simulator or the oracle must notice each."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

import pallas_kernels
from pallas_kernels.mosaic_gpu import target, tiles

from . import oracle, sparse_oracle
from .cases import Case, Spec, build
from .coded import CodedSpec, encode
from .page_scores_conformance import bounds_of

SPEC = Spec("seeded", (90, 41), heads=2, kv_heads=1, dtype="bf16")


def attention(case: Case):
    """(arguments of the op, what it should give)."""
    return (case.q, case.k_pages, case.v_pages, case.page_ids, case.counts, case.lengths), oracle.decode(case)[0]


def scores(case: Case):
    bounds = bounds_of(case)
    low, high = np.split(bounds, 2, axis=-1)
    right = sparse_oracle.page_scores(case.q, low, high, case.page_ids, case.counts, "max", None)
    return (case.q, bounds, case.page_ids, case.counts), right


def mass(case: Case):
    lse = oracle.decode(case)[1].astype(np.float32)
    right = sparse_oracle.mass(case, case.k_pages.astype(np.float64), lse, "sum", False)
    return (case.q, case.k_pages, case.page_ids, case.counts, case.lengths, lse), right


def opened(case: Case):
    """The first pages of a list of all, each into the page of its own number."""
    coded = encode(case, CodedSpec("seeded", (90, 41), codec="int8", heads=2, kv_heads=1, dtype="bf16"))
    pages = np.flatnonzero(np.isfinite(coded.scales).all((1, 2))).astype(np.int32)
    assert len(pages) == 7
    listed, right = pages[:-1], np.zeros((2, *case.k_pages.shape))
    right[0, listed], right[1, listed] = coded.keys[listed], coded.values[listed]
    dense = np.zeros_like(case.k_pages)
    return (dense, dense, coded.k_codes, coded.v_codes, coded.scales, pages, pages), right


OPS = {"paged_decode_attention": attention, "page_scores": scores, "attention_mass": mass, "open_pages": opened}
OPTIONS = {"open_pages": {"head_dim": 64, "count": np.int32(6)}}  # all but the last of the list
each_op = pytest.mark.parametrize("op", OPS)
masked = pytest.mark.parametrize("op", ("paged_decode_attention", "attention_mass"))  # others are of whole pages


def noticed(op: str) -> str:
    """What gives the kernel away: "race", "numbers", "refused" by the simulator, or nothing."""
    case = build(SPEC)
    arrays, expected = OPS[op](case)
    try:
        with target.simulated():
            options = {k: jax.numpy.asarray(v) if hasattr(v, "shape") else v for k, v in OPTIONS.get(op, {}).items()}
            call = functools.partial(getattr(pallas_kernels, op), implementation="mosaic_gpu", **options)
            got = np.asarray(call(*map(jax.numpy.asarray, arrays)), np.float64)
    except Exception as error:  # noqa: BLE001 (the simulator raises what its callbacks raise)
        gpu_callbacks.reset_gpu_interpret_mode_state()
        return f"refused: {error}"
    if gpu_callbacks.get_races().races_found:
        return "race"
    # Scores and masses are float32 all the way; attention rounds its result and its weights to bfloat16.
    tolerance = 2e-2 if op in ("paged_decode_attention", "open_pages") else 1e-3
    return "" if np.allclose(got, expected, atol=tolerance, rtol=tolerance) else "numbers"


@each_op
def test_the_kernel_itself_gives_no_cause(op):
    assert noticed(op) == ""


@each_op
def test_a_missing_wait_is_noticed(monkeypatch, op):
    monkeypatch.setattr(tiles, "wait", lambda barrier: None)
    assert noticed(op) == "race"


@masked
@pytest.mark.parametrize("shift", (-1, 1))
def test_an_off_by_one_mask_is_noticed(monkeypatch, op, shift):
    visible = tiles.visible
    monkeypatch.setattr(tiles, "visible", lambda slot, first, stop: visible(slot, first, stop + shift))
    assert noticed(op) == "numbers"


@each_op
def test_a_wrong_page_is_noticed(monkeypatch, op):
    page_of = tiles.page_of
    monkeypatch.setattr(tiles, "page_of", lambda ids, row, head, entry: page_of(ids, row, head, entry // 2))
    assert noticed(op) == "numbers"


@each_op
def test_a_page_beyond_the_count_is_noticed(monkeypatch, op):
    page_of = tiles.page_of
    monkeypatch.setattr(tiles, "page_of", lambda ids, row, head, entry: page_of(ids, row, head, entry + 1))
    assert noticed(op) == "numbers"
