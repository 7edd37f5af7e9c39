"""The Mosaic TPU kernels in the TPU simulator: right numbers without races, and seeded bugs are noticed."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types

import jax
import numpy as np
import pytest

from pallas_kernels import (
    attention_mass,
    page_scores,
    paged_decode_attention,
    paged_prefill_attention,
    quantized_decode_attention,
    quantized_prefill_attention,
)
from pallas_kernels.attention_mass import mosaic_tpu
from pallas_kernels.mosaic_tpu import attention, mass, stream, work

from . import oracle, sparse_oracle
from .cases import Spec, build
from .coded import CodedSpec, encode
from .quantized_prefill_attention_conformance import expected as before_own_page
from .tpu_conformance import in_tpu_layout
from .tpu_simulator import DMA_MODES, simulate

IDS = 16  # list entries in scalar memory at a time: small, so that short lists stream through it
SIDE_BY_SIDE = Spec("simulated, side by side", (400, 0, 20), heads=2, kv_heads=1)
HEAD_LISTS = Spec("simulated, head lists", (300, 20), (5, 20), heads=2, head_dim=128, head_lists=True, gaps=True)
SHARED_LISTS = Spec("simulated, shared lists", (130, 0, 40), (70, 0, 3), heads=4, dtype="bf16", head_dim=128)
CODED = CodedSpec(
    "simulated, int4", (300, 0, 20), codec="int4", heads=2, kv_heads=1, head_dim=128, scales_padding=96
)


CODED_CHUNK = dataclasses.replace(CODED, name="simulated, int4 chunk", queries=(40, 0, 5))


def judge(spec: Spec, mode: str) -> str | None:
    """What is wrong with the kernel on this case: "race", "numbers", "exception" or None."""
    case = build(spec)
    pools = in_tpu_layout(case.k_pages, case.v_pages)
    lists = (case.page_ids, case.counts, case.lengths)
    op, judge, arrays = paged_decode_attention, oracle.decode, (case.q, *pools, *lists)
    if spec.queries is not None:
        op, judge, arrays = paged_prefill_attention, oracle.prefill, (*arrays, case.query_starts)
    if isinstance(spec, CodedSpec):
        coded = encode(case, spec)
        case = dataclasses.replace(case, k_pages=coded.keys, v_pages=coded.values)
        op, arrays = quantized_decode_attention, (case.q, coded.k_codes, coded.v_codes, coded.scales, *lists)
        if spec.queries is not None:
            op, judge, arrays = quantized_prefill_attention, before_own_page, (*arrays, case.query_starts)
    try:
        (out, lse), race = simulate(mode, op, *arrays, **case.options(), return_lse=True)
    except jax.errors.JaxRuntimeError:
        return "exception"
    if race:
        return "race"
    tolerance = 2e-5 if spec.dtype == "f32" else 2e-2
    expected, expected_lse = judge(case)
    same = np.allclose(out.astype(np.float64), expected, tolerance, tolerance)
    return None if same and np.allclose(lse, expected_lse, tolerance, tolerance) else "numbers"


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(stream, "IDS", IDS)


@pytest.mark.parametrize("mode", DMA_MODES)
@pytest.mark.parametrize("spec", (SIDE_BY_SIDE, HEAD_LISTS, SHARED_LISTS, CODED, CODED_CHUNK), ids=str)
def test_right_and_free_of_races(spec: Spec, mode: str):
    assert judge(spec, mode) is None


@pytest.mark.parametrize("mode", DMA_MODES)
def test_page_scores_are_right_and_free_of_races(mode: str):
    case = build(Spec("simulated scores", (2100, 0, 20), heads=2, kv_heads=2))
    rng = np.random.default_rng(5)
    low, high = np.sort(rng.standard_normal((2, case.k_pages.shape[0], 2, 64)), axis=0).astype(np.float32)
    q = case.q.astype(np.float32)
    got, race = simulate(mode, page_scores, q, np.concatenate([low, high], -1), case.page_ids, case.counts, scale=1.0)
    for row, count in enumerate(case.counts[:, 0]):
        pages = case.page_ids[row, 0, :count]
        best = np.maximum(q[row] * low[pages], q[row] * high[pages]).sum(-1).T
        np.testing.assert_allclose(got[row, :, :count], best, 1e-5, 1e-5)
        assert (got[row, :, count:] < -1e29).all()
    assert not race


@pytest.mark.parametrize("mode", DMA_MODES)
def test_attention_mass_of_codes_is_right_and_free_of_races(mode: str):
    spec = dataclasses.replace(CODED, page_size=128, scales_padding=0)  # the fewer pages, the faster the simulator
    case = build(spec)
    coded = encode(case, spec)
    lse = oracle.decode(dataclasses.replace(case, k_pages=coded.keys, v_pages=coded.values))[1].astype(np.float32)
    lists = (case.page_ids, case.counts, case.lengths)
    got, race = simulate(mode, attention_mass, case.q, coded.k_codes, *lists, lse, scales=coded.scales, per_token=True)
    np.testing.assert_allclose(got, sparse_oracle.mass(case, coded.keys, lse, "sum", True), 2e-5, 2e-5)
    assert not race


def judge_mass(mode: str) -> str | None:
    """What is wrong with the kernel of attention mass: "race", "numbers" or None."""
    case = build(Spec("simulated mass", (130, 0, 40), (20, 0, 3), heads=2, head_dim=128, head_lists=True, gaps=True))
    keys = case.k_pages.astype(np.float64)
    lse = oracle.prefill(case)[1].astype(np.float32)
    lists = (case.page_ids, case.counts, case.lengths)
    arrays = (case.q, case.k_pages, *lists, lse, case.query_starts)
    got, race = simulate(mode, attention_mass, *arrays, logical_ids=case.logical_ids, per_token=True)
    if race:
        return "race"
    right = np.allclose(got, sparse_oracle.mass(case, keys, lse, "sum", True), 2e-5, 2e-5)
    return None if right else "numbers"


@pytest.mark.parametrize("mode", DMA_MODES)
def test_attention_mass_is_right_and_free_of_races(mode: str):
    assert judge_mass(mode) is None


def test_mass_that_another_list_was_given_is_noticed(monkeypatch):
    """What lies in VMEM is of the list before: the simulator shows NaN where nothing was."""
    source = inspect.getsource(mass)
    right = "o_ref[...] = jnp.zeros(o_ref.shape, jnp.float32)"
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(right, "pass"), "mutant", "exec"), mutant.__dict__)
    monkeypatch.setattr(mosaic_tpu, "mass", mutant.mass)
    assert judge_mass("eager") == "numbers"


LAST_PAGE = "self.page_copies(me, lambda i: 0, buffer, j):\n" + 24 * " "
# Where it is: what is right, and what a bug makes of it.
BUGS = {
    "a page is not waited for": (stream, f"{LAST_PAGE}copy.wait()", f"{LAST_PAGE}pass"),
    "ids are not waited for": (stream, "self.chunk_copy(r, chunk, slot).wait()", "pass"),
    "the buffer in use is filled": (stream, "buf.at[buffer, :, j]", "buf.at[0, :, j]"),
    "a wrong page": (stream, "self.ids[slot, i, at + j], buffer", "self.ids[slot, i, at], buffer"),
    "a mask one token short": (stream, "seen = place <= self.newest(query)", "seen = place < self.newest(query)"),
    "a mask one token long": (stream, "seen = place <= self.newest(query)", "seen = place <= self.newest(query) + 1"),
    "dead values are not zeroed": (attention, "v = jnp.where(alive[None], v, 0)", "pass"),
}  # fmt: skip
QUICK = ("a page is not waited for", "a wrong page", "a mask one token short")


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=() if bug in QUICK else pytest.mark.slow) for bug in BUGS]
)
def test_a_seeded_bug_is_noticed(monkeypatch, bug: str):
    where, right, wrong = BUGS[bug]
    source = inspect.getsource(where)
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(right, wrong), "mutant", "exec"), mutant.__dict__)
    if where is stream:
        mutant.IDS = IDS
        monkeypatch.setattr(attention, "Stream", mutant.Stream)
    else:
        monkeypatch.setattr(work, "attend_lists", mutant.attend_lists)
    assert any(judge(SIDE_BY_SIDE, mode) is not None for mode in DMA_MODES)
