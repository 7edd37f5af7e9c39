"""What the conformance classes share: how a backend is called, judged, and held to what it declines.

A backend's test file subclasses the class of each op:

    class TestXla(PagedDecodeAttentionConformance):
        backend = "xla"

It may set `supports_...` flags for what the backend does not do (those cases must then raise
NoImplementation), and override `interpreted` with a context in which kernels run without their device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import NoImplementation

from .cases import Spec


@functools.cache
def jitted(op: Callable[..., Any], backend: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """One jitted function per op and options, so that cases of equal shapes share a compilation."""
    return jax.jit(functools.partial(op, implementation=backend, **dict(static)))


class Conformance:
    """Base of the conformance classes."""

    backend = "xla"
    tolerance = {"f32": 2e-5, "bf16": 2e-2}
    supports_head_dims: tuple[int, ...] | None = None  # None: all
    supports_page_sizes: tuple[int, ...] | None = None
    supports_dtypes: tuple[str, ...] = ("f32", "bf16")
    supports_head_lists = True
    supports_gaps = True
    supports_window = True
    supports_soft_cap = True
    supports_sinks = True
    supports_mha = True

    @contextlib.contextmanager
    def interpreted(self) -> Iterator[None]:
        """Context of every call; backends whose device is absent interpret their kernels in it."""
        yield

    def run(self, op: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Calls `op` with this backend, jitted; options that are not arrays are static."""
        static = {k: v for k, v in options.items() if not hasattr(v, "shape")}
        given = {k: v for k, v in options.items() if hasattr(v, "shape")}
        with self.interpreted():
            call = jitted(op, self.backend, tuple(static.items()))
            return jax.tree.map(np.asarray, call(*arrays, **given))

    def supports(self, spec: Spec) -> bool:
        """Whether the backend serves cases like `spec`, by its flags."""
        return (
            (self.supports_head_dims is None or spec.head_dim in self.supports_head_dims)
            and (self.supports_page_sizes is None or spec.page_size in self.supports_page_sizes)
            and spec.dtype in self.supports_dtypes
            and (self.supports_head_lists or not spec.head_lists)
            and (self.supports_gaps or not spec.gaps)
            and (self.supports_window or spec.window is None)
            and (self.supports_soft_cap or spec.soft_cap is None)
            and (self.supports_sinks or not spec.sinks)
            and (self.supports_mha or spec.heads != spec.kv_heads)
        )

    def declines(self, spec: Spec, call: Callable[[], Any]) -> bool:
        """True, after checking that it does decline, where the flags say that the backend does not serve
        `spec`."""
        if self.supports(spec):
            return False
        with pytest.raises(NoImplementation, match=self.backend):
            call()
        return True

    def close(self, got: np.ndarray, expected: np.ndarray, dtype: str, what: str = "out") -> None:
        """Requires finite values within the tolerance of `dtype`."""
        got = got.astype(np.float64)
        assert np.isfinite(got).all(), f"{what} is not finite"
        np.testing.assert_allclose(
            got, expected, atol=self.tolerance[dtype], rtol=self.tolerance[dtype], err_msg=what
        )
