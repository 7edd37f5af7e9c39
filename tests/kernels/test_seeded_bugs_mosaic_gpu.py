"""One seeded bug per kind in the Mosaic GPU kernels; the simulator or the oracle must notice each."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

import pallas_kernels
from pallas_kernels.mosaic_gpu import target, tiles

from . import oracle, sparse_oracle
from .cases import Case, Spec, build
from .page_scores_conformance import bounds_of

SPEC = Spec("seeded", (90, 41), heads=2, kv_heads=1, dtype="bf16")


def attention(case: Case):
    """(arguments of the op beside its queries, what it should give)."""
    return (case.k_pages, case.v_pages, case.page_ids, case.counts, case.lengths), oracle.decode(case)[0]


def scores(case: Case):
    bounds = bounds_of(case)
    low, high = np.split(bounds, 2, axis=-1)
    right = sparse_oracle.page_scores(case.q, low, high, case.page_ids, case.counts, "max", None)
    return (bounds, case.page_ids, case.counts), right


def mass(case: Case):
    lse = oracle.decode(case)[1].astype(np.float32)
    right = sparse_oracle.mass(case, case.k_pages.astype(np.float64), lse, "sum", False)
    return (case.k_pages, case.page_ids, case.counts, case.lengths, lse), right


OPS = {"paged_decode_attention": attention, "page_scores": scores, "attention_mass": mass}
each_op = pytest.mark.parametrize("op", OPS)
masked = pytest.mark.parametrize("op", [op for op in OPS if op != "page_scores"])  # bounds are of whole pages


def noticed(op: str) -> str:
    """What gives the kernel away: "race", "numbers", "refused" by the simulator, or nothing."""
    case = build(SPEC)
    arrays, expected = OPS[op](case)
    try:
        with target.simulated():
            call = getattr(pallas_kernels, op)
            got = np.asarray(call(*map(jax.numpy.asarray, (case.q, *arrays)), implementation="mosaic_gpu"), np.float64)
    except Exception as error:  # noqa: BLE001 (the simulator raises what its callbacks raise)
        gpu_callbacks.reset_gpu_interpret_mode_state()
        return f"refused: {error}"
    if gpu_callbacks.get_races().races_found:
        return "race"
    # Scores and masses are float32 all the way; attention rounds its result and its weights to bfloat16.
    tolerance = 2e-2 if op == "paged_decode_attention" else 1e-3
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
