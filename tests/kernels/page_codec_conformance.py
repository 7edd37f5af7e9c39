"""What every backend of `quantize_pages` and of `open_pages` must do."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels import codes, layouts, open_pages, quantize_pages

from . import sparse_oracle
from .cases import DTYPES
from .coded import CODE_DTYPES, CodedSpec, pack
from .conformance import Conformance

# `lengths` holds the number of listed pages.
SPECS = (
    CodedSpec("one page", (1,), codec="int8"),
    CodedSpec("int8", (5,), codec="int8", page_size=32, head_dim=80, dtype="bf16", scale_dtype="bf16"),
    CodedSpec("fp8", (5,), codec="fp8", page_size=32, head_dim=128),
    CodedSpec("fp8 bf16", (3,), codec="fp8", dtype="bf16", scale_dtype="bf16"),
    CodedSpec("int4", (21,), codec="int4", page_size=32, head_dim=128, scales_padding=64),
    CodedSpec("int4 bf16", (3,), codec="int4", heads=3, kv_heads=3, dtype="bf16", scale_dtype="bf16"),
    CodedSpec("int4 side by side", (5,), codec="int4", side_by_side=True, dtype="bf16", scales_padding=96),
    CodedSpec("int8 side by side", (5,), codec="int8", side_by_side=True, kv_heads=1),
)
CASES = [pytest.param(spec, None, id=str(spec)) for spec in SPECS]
CASES += [pytest.param(SPECS[4], count, id=f"{SPECS[4]}, {count} listed") for count in (0, 3)]


class PageCodecConformance(Conformance):
    """What the classes of both ops share: pools and lists."""

    def pools(self, spec: CodedSpec, rng: np.random.Generator):
        """Dense and coded pools of random content, with pages on both sides that no list names."""
        pages, size, dim = spec.lengths[0] + 4, spec.page_size, spec.head_dim
        dense = [rng.standard_normal((pages, spec.kv_heads, size, dim)) * 3 + 0.5 for _ in range(2)]
        dense[0][..., 3] = 0  # a channel and a token without content
        dense[1][:, :, 2] = 0
        dense = [pool.astype(DTYPES[spec.dtype]) for pool in dense]
        rows = size // 2 if spec.codec == "int4" else size
        codes_shape = (pages + 2, spec.kv_heads, rows, dim)
        values = rng.integers(0, 120, (2, *codes_shape)).astype(np.uint8).view(CODE_DTYPES[spec.codec])
        width = codes.scales_width(spec.codec, size, dim) + spec.scales_padding
        scales = rng.uniform(0.1, 1, (pages + 2, spec.kv_heads, width)).astype(DTYPES[spec.scale_dtype])
        return tuple(dense), tuple(values), scales

    def stored(self, spec: CodedSpec, pools) -> tuple:
        """Pools of K and V as the spec stores them."""
        if not spec.side_by_side:
            return pools
        together = np.concatenate(pools, axis=-1)
        return np.pad(together, ((0, 0),) * 3 + ((0, 128 - together.shape[-1]),)), None

    def lists(self, spec: CodedSpec, sources: int, targets: int, rng: np.random.Generator):
        """Pages to read out of so many, and pages to write."""
        count = spec.lengths[0]
        return [rng.permutation(np.arange(1, n))[:count].astype(np.int32) for n in (sources, targets)]

    def supports(self, spec: CodedSpec) -> bool:
        return super().supports(spec) and spec.codec in self.supports_codecs

    supports_codecs: tuple[str, ...] = ("int8", "fp8", "int4")


class QuantizePagesConformance(PageCodecConformance):
    """Subclass it with the name of a backend."""

    @pytest.mark.parametrize(("spec", "count"), CASES)
    def test_codes_are_nearest_and_other_pages_stay(self, spec: CodedSpec, count: int | None):
        rng = np.random.default_rng(2)
        dense, values, scales = self.pools(spec, rng)
        sources, targets = self.lists(spec, len(dense[0]), len(scales), rng)
        pools = (*self.stored(spec, values), scales, *self.stored(spec, dense))
        options = {"head_dim": spec.head_dim}
        if count is not None:
            sources[count:], targets[count:] = -5, 10**8
            options["count"] = np.int32(count)

        def call():
            return self.run(quantize_pages, *pools, sources, targets, **options)

        if self.declines(spec, call):
            return
        k_codes, v_codes, got_scales = call()
        got = [np.asarray(x) for x in layouts.views(k_codes, v_codes, spec.head_dim)]
        sources, targets = sources[:count], targets[:count]
        others = np.setdiff1d(np.arange(1, len(scales)), targets)
        assert got_scales.dtype == scales.dtype
        np.testing.assert_array_equal(got_scales[others], scales[others])
        parts = self.parts(got_scales[targets], spec)
        for which, axis in ((0, -2), (1, -1)):
            assert got[which].dtype == values[which].dtype
            np.testing.assert_array_equal(got[which][others], values[which][others])
            live = dense[which][sources].astype(np.float64)
            self.check(got[which][targets], live, spec, axis, *parts[which])

    def parts(self, scales: np.ndarray, spec: CodedSpec):
        """(scale, zero or None) of the keys and of the values."""
        sides, first = [], 0
        for width in (spec.head_dim, spec.page_size):
            pair = []
            for _ in range(2 if spec.codec == "int4" else 1):
                pair.append(scales[..., first : first + width])
                first += width
            sides.append((pair[0], pair[1] if len(pair) > 1 else None))
        return sides

    def check(self, stored, live, spec: CodedSpec, axis: int, scale, zero) -> None:
        """Scales as defined, and every code as near to its value as codes can be."""
        expected_scale, expected_zero = sparse_oracle.scale_of(live, spec.codec, axis, scale.dtype)
        step = 2**-8 if spec.scale_dtype == "bf16" else 1e-6  # one unit in the last place
        np.testing.assert_allclose(scale.astype(np.float64), expected_scale.astype(np.float64), rtol=step)
        if zero is not None:
            np.testing.assert_allclose(zero.astype(np.float64), expected_zero.astype(np.float64), rtol=step)
        ratio = sparse_oracle.ratios(live, spec.codec, axis, scale, zero)
        if spec.codec == "int4":
            stored = np.concatenate([stored & 15, stored >> 4], axis=-2)
        error = np.abs(stored.astype(np.float64) - ratio)
        allowed = np.maximum(np.abs(ratio) * 2**-4, 2**-10) if spec.codec == "fp8" else 0.5 + codes.NUDGE
        assert (error <= allowed + 1e-4).all()


class OpenPagesConformance(PageCodecConformance):
    """Subclass it with the name of a backend."""

    @pytest.mark.parametrize(("spec", "count"), CASES)
    def test_pages_hold_what_the_codes_stand_for(self, spec: CodedSpec, count: int | None):
        rng = np.random.default_rng(4)
        dense, values, scales = self.pools(spec, rng)
        sources, targets = self.lists(spec, len(scales), len(dense[0]), rng)
        if spec.codec == "int4":  # whole random codes, of which `values` are the bytes
            full = rng.integers(0, 16, (2, *dense[0].shape)).astype(np.uint8)
            full = np.concatenate([full, full[:, :2]], axis=1)
            values = tuple(pack(x) for x in full)
        else:
            full = values
        pools = (*self.stored(spec, dense), *self.stored(spec, values), scales)
        options = {"head_dim": spec.head_dim}
        if count is not None:
            sources[count:], targets[count:] = -5, 10**8
            options["count"] = np.int32(count)

        def call():
            return self.run(open_pages, *pools, sources, targets, **options)

        if self.declines(spec, call):
            return
        got = [np.asarray(x) for x in layouts.views(*call(), spec.head_dim)]
        sources, targets = sources[:count], targets[:count]
        others = np.setdiff1d(np.arange(1, len(dense[0])), targets)
        parts = QuantizePagesConformance.parts(self, scales[sources], spec)
        for which, axis in ((0, -2), (1, -1)):
            scale, zero = parts[which]
            expected = full[which][sources].astype(np.float64) * np.expand_dims(scale.astype(np.float64), axis)
            if zero is not None:
                expected = expected + np.expand_dims(zero.astype(np.float64), axis)
            assert got[which].dtype == dense[which].dtype
            np.testing.assert_array_equal(got[which][others], dense[which][others])
            self.close(got[which][targets], expected, spec.dtype)
