"""One seeded bug per kind in the Mosaic GPU decode kernel; the simulator or the oracle must notice each."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import paged_decode_attention
from pallas_kernels.mosaic_gpu import target, tiles

from . import oracle
from .cases import Spec, build

SPEC = Spec("seeded", (90, 41), heads=2, kv_heads=1, dtype="bf16")


def noticed(params=None) -> str:
    """What gives the kernel away: "race", "numbers", "refused" by the simulator, or nothing."""
    case = build(SPEC)
    arrays = (case.q, case.k_pages, case.v_pages, case.page_ids, case.counts, case.lengths)
    try:
        with target.simulated(params):
            out = paged_decode_attention(*map(jax.numpy.asarray, arrays), implementation="mosaic_gpu")
            out = np.asarray(out, np.float64)
    except Exception as error:  # noqa: BLE001 (the simulator raises what its callbacks raise)
        gpu_callbacks.reset_gpu_interpret_mode_state()
        return f"refused: {error}"
    if gpu_callbacks.get_races().races_found:
        return "race"
    expected, _ = oracle.decode(case)
    return "" if np.allclose(out, expected, atol=2e-2, rtol=2e-2) else "numbers"


def test_the_kernel_itself_gives_no_cause():
    assert noticed() == ""


def test_a_missing_wait_is_noticed(monkeypatch):
    monkeypatch.setattr(tiles, "wait", lambda barrier: None)
    assert noticed() == "race"


@pytest.mark.parametrize("shift", (-1, 1))
def test_an_off_by_one_mask_is_noticed(monkeypatch, shift):
    visible = tiles.visible
    monkeypatch.setattr(tiles, "visible", lambda slot, first, stop: visible(slot, first, stop + shift))
    assert noticed() == "numbers"


def test_a_wrong_page_is_noticed(monkeypatch):
    page_of = tiles.page_of
    monkeypatch.setattr(tiles, "page_of", lambda ids, row, head, entry: page_of(ids, row, head, entry // 2))
    assert noticed() == "numbers"


def test_a_page_beyond_the_count_is_noticed(monkeypatch):
    page_of = tiles.page_of
    monkeypatch.setattr(tiles, "page_of", lambda ids, row, head, entry: page_of(ids, row, head, entry + 1))
    assert noticed() == "numbers"
