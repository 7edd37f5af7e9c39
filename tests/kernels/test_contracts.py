"""What the public functions refuse, beside dense attention: keys, bounds, codes, scales, lists of pages."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import pallas_kernels
from pallas_kernels.workload import Workload


@pytest.fixture(autouse=True)
def own_checks_only():
    """Without the checks of annotations, which only tests have and which speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def shape(*extents: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(extents, dtype)


def trace(op: str, call: dict) -> None:
    """Calls `op` on abstract arrays."""
    arrays = {name: value for name, value in call.items() if hasattr(value, "shape")}
    static = {name: value for name, value in call.items() if name not in arrays}
    jax.eval_shape(functools.partial(getattr(pallas_kernels, op), implementation="xla", **static), **arrays)


F32, BF16 = jnp.float32, jnp.bfloat16
REFUSED = (
    ("page_bounds", {"bounds": shape(33, 2, 127, dtype=BF16)}, "must store 63 minima and as many maxima"),
    ("page_bounds", {"bounds": shape(33, 3, 128, dtype=BF16)}, "same KV heads; got 3 and 2"),
    ("page_bounds", {"targets": shape(5)}, r"targets must have shape \[S\] = \[16\]"),
    ("page_bounds", {"count": shape(1)}, "count must have shape"),
    ("page_scores", {"bounds": shape(33, 2, 64, dtype=BF16)}, "must store 64 minima"),
    ("page_scores", {"q": shape(4, 7, 64, dtype=BF16)}, "multiple of the KV heads; got H = 7"),
    ("page_scores", {"counts": shape(4, 2)}, r"counts must have shape \[B Kl\] = \[4, 1\]"),
    ("page_scores", {"group": "median"}, "group must be one of max, mean, sum; got 'median'"),
    ("select_pages", {"width": 0}, "width must be at least 1 page; got 0"),
    ("select_pages", {"budgets": shape(3)}, r"budgets must have shape .* = \[4\]; got \[3\]"),
    ("select_pages", {"page_ids": shape(4, 1, 9)}, r"page_ids must have shape .*8\]; got \[4, 1, 9\]"),
    ("select_pages", {"sinks": shape(4, 1)}, "sinks must have shape"),
    ("attention_mass", {"lse": shape(4, 7, dtype=F32)}, r"lse must have shape \[T H\] = \[4, 8\]"),
    ("attention_mass", {"q": shape(5, 8, 64, dtype=BF16), "lse": shape(5, 8, dtype=F32)}, "lengths must have"),
    ("attention_mass", {"scales": shape(33, 2, 96, dtype=F32)}, "codes must have one of the dtypes int8"),
    ("attention_mass", {"k_pages": shape(33, 2, 32, 64, dtype=jnp.int8)}, "k_pages must have a floating dtype"),
    ("window_scores", {"q": shape(3, 16, 8, 64, dtype=BF16)}, "q must have shape"),
    ("window_scores", {"sinks": shape(2, dtype=F32)}, r"sinks must have shape \[H\] = \[8\]"),
    ("quantized_decode_attention", {"scales": shape(33, 2, 95, dtype=BF16)}, "scales must store 96 values"),
    ("quantized_decode_attention", {"v_codes": None}, "k_codes must store 128 values"),
    ("quantized_decode_attention", {"v_codes": shape(33, 2, 32, 64, dtype=jnp.uint8)}, "must share a dtype"),
    ("quantize_pages", {"head_dim": 32}, "k_codes must store 32 values"),
    ("open_pages", {"page_ids": shape(3)}, "targets must have shape"),
)


@pytest.mark.parametrize(("op", "changes", "message"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(op, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trace(op, Workload().calls()[op] | changes)


def test_coded_and_dense_pools_must_agree():
    call = Workload().calls()["quantize_pages"]
    dense = dataclasses.replace(Workload(), page_size=16).calls()["quantize_pages"]
    with pytest.raises(ValueError, match=r"agree in K, P and D; got \[2, 32, 64\] and \[2, 16, 64\]"):
        trace("quantize_pages", call | {name: dense[name] for name in ("k_pages", "v_pages")})
