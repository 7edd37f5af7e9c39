"""What every backend of `page_bounds` must do."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import page_bounds

from .cases import DTYPES, Spec
from .coded import CODE_DTYPES, CodedSpec, build_coded
from .conformance import Conformance

# `lengths` holds the number of listed pages.
SPECS = (
    Spec("one page", (1,)),
    Spec("some pages", (5,), page_size=32, head_dim=80),
    Spec("bf16", (21,), dtype="bf16", head_dim=128),
    Spec("mha", (3,), heads=3, kv_heads=3, head_dim=16, page_size=64),
    Spec("one head", (37,), kv_heads=1, dtype="bf16"),
)


class PageBoundsConformance(Conformance):
    """Subclass it with the name of a backend."""

    def pools(self, spec: Spec, padding: int = 0):
        """(bounds, keys with NaN in pages that are not listed, sources, targets)."""
        rng = np.random.default_rng(5)
        pages, dtype = spec.lengths[0], DTYPES[spec.dtype]
        keys = rng.standard_normal((pages + 4, spec.kv_heads, spec.page_size, spec.head_dim + padding))
        sources = rng.permutation(np.arange(1, pages + 4))[:pages].astype(np.int32)
        dead = np.setdiff1d(np.arange(pages + 4), sources)
        keys[dead] = np.nan
        keys[..., spec.head_dim :] = np.nan
        bounds = rng.standard_normal((pages + 6, spec.kv_heads, 2 * spec.head_dim)).astype(dtype)
        targets = rng.permutation(np.arange(1, pages + 6))[:pages].astype(np.int32)
        return bounds, keys.astype(dtype), sources, targets

    def check(self, got, bounds, keys, sources, targets) -> None:
        """Listed entries hold the exact minima and maxima, the others what they held."""
        half = bounds.shape[2] // 2
        live = keys[sources][..., :half].astype(np.float32)
        expected = bounds.astype(np.float32)
        expected[targets] = np.concatenate([live.min(2), live.max(2)], axis=-1)
        assert got.dtype == bounds.dtype
        np.testing.assert_array_equal(got[1:].astype(np.float32), expected[1:])

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_holds_the_minima_and_maxima_of_listed_pages(self, spec: Spec):
        bounds, keys, sources, targets = self.pools(spec)

        def call():
            return self.run(page_bounds, bounds, keys, sources, targets)

        if not self.declines(spec, call):
            self.check(call(), bounds, keys, sources, targets)

    @pytest.mark.parametrize("count", (0, 1, 19))
    def test_items_past_the_count_are_not_read(self, count: int):
        bounds, keys, sources, targets = self.pools(SPECS[2])
        sources[count:], targets[count:] = 10**8, 10**8
        got = self.run(page_bounds, bounds, keys, sources, targets, count=np.int32(count))
        self.check(got, bounds, keys, sources[:count], targets[:count])

    def test_targets_are_the_sources_unless_given(self):
        bounds, keys, sources, _ = self.pools(SPECS[1])
        self.check(self.run(page_bounds, bounds, keys, sources), bounds, keys, sources, sources)

    def test_keys_may_be_padded_or_beside_values(self):
        bounds, keys, sources, targets = self.pools(Spec("wide", (5,)), padding=64)
        got = self.run(page_bounds, bounds, keys, sources, targets)
        self.check(got, bounds, keys, sources, targets)

    def test_a_narrower_dtype_rounds_outwards(self):
        if not {"f32", "bf16"} <= set(self.supports_dtypes):
            return
        bounds, keys, sources, targets = self.pools(Spec("narrow", (9,), head_dim=128))
        got = self.run(page_bounds, bounds.astype(jnp.bfloat16), keys, sources, targets)
        low, high = np.split(got[targets].astype(np.float32), 2, axis=-1)
        live = keys[sources]
        assert (low <= live.min(2)).all() and (high >= live.max(2)).all()
        np.testing.assert_allclose(low, live.min(2), rtol=2**-7)
        np.testing.assert_allclose(high, live.max(2), rtol=2**-7)

    @pytest.mark.parametrize("codec", CODE_DTYPES)
    def test_bounds_of_coded_pages_are_those_of_the_decoded_keys(self, codec: str):
        _, coded = build_coded(CodedSpec("bounds", (128, 64), codec=codec, page_size=32))
        pages, kv_heads, _, head_dim = coded.keys.shape
        listed = np.flatnonzero(np.isfinite(coded.scales).all((1, 2))).astype(np.int32)
        bounds = np.zeros((pages, kv_heads, 2 * head_dim), np.float32)
        got = self.run(page_bounds, bounds, coded.k_codes, listed, scales=coded.scales)
        wanted = np.concatenate([coded.keys.min(2), coded.keys.max(2)], axis=-1)[listed]
        assert len(listed) == 6
        np.testing.assert_allclose(got[listed], wanted, rtol=1e-6, atol=1e-6)
