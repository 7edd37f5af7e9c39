"""Which backend serves, what is said when none does, and what the public functions refuse."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Declined, NoImplementation, dispatch, explain, kv_write, paged_decode_attention

from .cases import Case, Spec, build


@pytest.fixture
def case() -> Case:
    return build(Spec("dispatch", (20, 3)))


@pytest.fixture
def own_checks_only():
    """Without the checks of annotations, which tests add and users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def backends(monkeypatch):
    """Backends of an op that does not exist: one serves, one declines."""

    def declining(x, **options):
        raise Declined(f"dtype {x.dtype} is not served")

    package = "pallas_kernels.twice"
    for name, function in {"mosaic_tpu": declining, "xla": lambda x: 2 * x}.items():
        monkeypatch.setitem(sys.modules, f"{package}.{name}", types.SimpleNamespace(twice=function))
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))

    def twice(x, *, implementation=None):
        return dispatch.dispatch("twice", implementation, x)

    monkeypatch.setattr(pallas_kernels, "twice", twice, raising=False)
    return twice


def test_the_first_candidate_that_does_not_decline_serves(backends):
    assert backends(np.float32(3), implementation=("mosaic_gpu", "mosaic_tpu", "xla")) == 6


def test_every_reason_is_listed_when_all_decline(backends):
    with pytest.raises(NoImplementation) as caught:
        backends(np.float32(3), implementation=("mosaic_gpu", "mosaic_tpu"))
    assert caught.value.reasons == {
        "mosaic_gpu": "twice has no mosaic_gpu backend",
        "mosaic_tpu": "dtype float32 is not served",
    }
    assert "mosaic_tpu: dtype float32 is not served" in str(caught.value)


def test_a_backend_whose_imports_are_absent_declines(tmp_path, monkeypatch):
    (tmp_path / "mosaic_gpu.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.setattr(sys.modules["pallas_kernels.kv_write"], "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "pallas_kernels.kv_write.mosaic_gpu", raising=False)
    with pytest.raises(Declined, match="needs the module a_package_that_is_not_installed"):
        dispatch.backend("kv_write", "mosaic_gpu")


def test_xla_comes_last_on_every_platform():
    for platform in ("cpu", "gpu", "cuda", "tpu", "some other"):
        assert dispatch.candidates(platform=platform)[-1] == "xla"
    assert dispatch.candidates(platform="gpu")[0] == "mosaic_gpu"
    assert dispatch.candidates(platform="tpu")[0] == "mosaic_tpu"
    assert dispatch.candidates(("xla", "reference")) == ("xla", "reference")


@pytest.mark.parametrize("given", ("cuda", (), ("xla", "fast")))
def test_unknown_names_are_refused(given):
    with pytest.raises(ValueError, match="must name one or more of mosaic_gpu"):
        dispatch.candidates(given)


def test_explain_names_the_choice_and_the_declines(backends, case):
    order = ("mosaic_gpu", "mosaic_tpu", "xla")
    chosen, reasons = explain("twice", jax.ShapeDtypeStruct((4,), jnp.float32), implementation=order)
    assert chosen == "xla" and set(reasons) == {"mosaic_gpu", "mosaic_tpu"}
    chosen, reasons = explain(backends, np.ones(2, np.int32), implementation="mosaic_tpu")
    assert chosen is None and reasons["mosaic_tpu"] == "dtype int32 is not served"
    assert reasons["xla"] == "is not tried on cpu"
    arrays = (case.q, case.k_pages, case.v_pages, case.page_ids, case.counts, case.lengths)
    chosen, reasons = explain(paged_decode_attention, *arrays, window=8, implementation=("xla", "reference"))
    assert chosen == "xla" and "xla" not in reasons


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    (
        (
            {"q": np.zeros((2, 3, 64), np.float32)},
            ValueError,
            "multiple of the KV heads; got H = 3 and K = 2",
        ),
        ({"q": np.zeros((2, 4, 32), np.float32)}, ValueError, "head dim 32 must store 32 values.*got 64"),
        ({"q": np.zeros((3, 4, 64), np.float32)}, ValueError, "one query per row"),
        ({"q": np.zeros((2, 4, 64), np.int32)}, TypeError, "q must have a floating dtype; got int32"),
        ({"v_pages": np.zeros((2, 2, 16, 64), np.float32)}, ValueError, "v_pages must have shape"),
        ({"v_pages": jnp.bfloat16}, ValueError, "share a dtype; got float32 and bfloat16"),
        ({"page_ids": np.zeros((2, 3, 4), np.int32)}, ValueError, "Kl = 1 or 2.*got Kl = 3"),
        ({"page_ids": np.zeros((2, 1, 4), np.int64)}, TypeError, "page_ids must be int32"),
        ({"counts": np.zeros((2,), np.int32)}, ValueError, r"counts must have shape \[B Kl\] = \[2, 1\]"),
        ({"lengths": np.zeros((3,), np.int32)}, ValueError, "lengths must have shape"),
        ({"logical_ids": np.zeros((2, 1, 9), np.int32)}, ValueError, "logical_ids must have shape"),
        ({"window": 0}, ValueError, "window must be None or at least 1 token; got 0"),
        ({"soft_cap": -1.0}, ValueError, "soft_cap must be None or positive"),
        ({"sinks": np.zeros(2, np.float32)}, ValueError, r"sinks must have shape \[H\] = \[4\]"),
    ),
)
def test_arguments_that_do_not_fit_are_refused(own_checks_only, case, changes, error, message):
    names = ("q", "k_pages", "v_pages", "page_ids", "counts", "lengths")
    arrays = {name: getattr(case, name) for name in names}
    if not hasattr(changes.get("v_pages", 0), "shape") and "v_pages" in changes:
        changes = {"v_pages": case.v_pages.astype(changes["v_pages"])}
    with pytest.raises(error, match=message):
        paged_decode_attention(**(arrays | changes))


def test_new_tokens_that_do_not_fit_the_pools_are_refused(own_checks_only, case):
    at = np.zeros(3, np.int32)
    new = np.zeros((3, 2, 64), np.float32)
    with pytest.raises(ValueError, match="k_new must have shape"):
        kv_write(case.k_pages, case.v_pages, new[:, :1], new, at, at)
    with pytest.raises(ValueError, match=r"offsets must have shape \[T\] = \[3\]; got \[2\]"):
        kv_write(case.k_pages, case.v_pages, new, new, at, at[:2])
