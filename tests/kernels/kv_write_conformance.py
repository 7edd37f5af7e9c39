"""What every backend of `kv_write` must do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import kv_write

from .cases import DTYPES, Spec
from .conformance import Conformance

SPECS = (
    Spec("one token", (1,)),
    Spec("many", (37,), page_size=32),
    Spec("bf16", (21,), dtype="bf16", head_dim=128),
    Spec("mha", (9,), kv_heads=4, head_dim=80, page_size=64),
    Spec("one head", (17,), heads=4, kv_heads=1, head_dim=16, dtype="bf16"),
)


class KvWriteConformance(Conformance):
    """Subclass it with the name of a backend."""

    @pytest.mark.parametrize("padding", (0, 5))
    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_writes_the_named_slots_and_no_other(self, spec: Spec, padding: int):
        rng = np.random.default_rng(7)
        tokens, pages, dtype = spec.lengths[0], 6, DTYPES[spec.dtype]
        pools = [
            rng.standard_normal((pages, spec.kv_heads, spec.page_size, spec.head_dim)).astype(dtype)
            for _ in range(2)
        ]
        new = [
            rng.standard_normal((tokens + padding, spec.kv_heads, spec.head_dim)).astype(dtype)
            for _ in range(2)
        ]
        slots = rng.permutation(np.arange(spec.page_size, pages * spec.page_size))[:tokens]
        slots = np.append(slots, np.zeros(padding, np.int64)).astype(
            np.int32
        )  # padding names one slot of page 0
        page_ids, offsets = slots // spec.page_size, slots % spec.page_size

        def write():
            return self.run(kv_write, *pools, *new, page_ids, offsets)

        if self.declines(spec, write):
            return
        for got, pool, values in zip(write(), pools, new, strict=True):
            expected = pool.copy()
            for page, offset, value in zip(page_ids, offsets, values, strict=True):
                expected[page, :, offset] = value
            assert got.dtype == pool.dtype
            np.testing.assert_array_equal(got[1:].astype(np.float32), expected[1:].astype(np.float32))

    def test_casts_to_the_dtype_of_the_pools(self):
        pool = np.zeros((3, 2, 16, 128), jnp.bfloat16)
        new = np.full((1, 2, 128), 1.001, np.float32)
        at = np.asarray([1], np.int32)
        if self.supports_mixed_dtypes:
            k_pages, _ = self.run(kv_write, pool, pool, new, new, at, at)
            assert k_pages.dtype == pool.dtype and k_pages[1, 0, 1, 0] == 1

    supports_mixed_dtypes = True
