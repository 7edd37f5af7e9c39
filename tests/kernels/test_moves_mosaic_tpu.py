"""The Mosaic TPU backends of the ops on whole pages, interpreted and simulated, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layouts, page_bounds

from . import page_bounds_conformance as bounds
from . import page_codec_conformance as codec
from .cases import Spec
from .coded import CODE_DTYPES, CodedSpec
from .tpu_conformance import TpuLayout, in_whole_lanes
from .tpu_simulator import DMA_MODES, simulate


class WholeLanes(TpuLayout):
    """Pools come padded to whole lanes; what is padding of results is cut off where the op does not read it."""

    def run(self, op: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        pools = [x if x is None or x.ndim < 3 else in_whole_lanes(x, 0) for x in arrays]
        found = super(TpuLayout, self).run(op, *pools, **options)
        return tuple(
            None if new is None else new[..., : old.shape[-1]] if new.ndim == 3 else new
            for new, old in zip(found, arrays, strict=False)
        )

    def supports(self, spec: CodedSpec) -> bool:
        return super().supports(spec) and spec.kv_heads != 3


class TestMosaicTpuOpenPages(WholeLanes, codec.OpenPagesConformance):
    pass


class TestMosaicTpuQuantizePages(WholeLanes, codec.QuantizePagesConformance):
    pass


class TestMosaicTpuPageBounds(TpuLayout, bounds.PageBoundsConformance):
    """Bounds have halves of whole lanes, or of half as many; keys are padded."""

    def run(self, op: Callable[..., Any], pool: np.ndarray, keys: np.ndarray, *lists: Any, **options: Any) -> Any:
        half = pool.shape[-1] // 2
        spare = -pool.shape[-1] % layouts.LANES // 2
        wide = np.concatenate([np.pad(x, ((0, 0), (0, 0), (0, spare))) for x in np.split(pool, 2, axis=-1)], axis=-1)
        if "scales" in options:
            options["scales"] = in_whole_lanes(options["scales"], np.nan)
        found = super(TpuLayout, self).run(op, wide, in_whole_lanes(keys, 0), *lists, **options)
        return np.concatenate([found[..., :half], found[..., half + spare : 2 * half + spare]], axis=-1)

    def supports(self, spec: Spec) -> bool:
        return super().supports(spec) and spec.kv_heads != 3


@pytest.mark.parametrize("mode", DMA_MODES)
def test_pages_pass_without_races(mode: str):
    case = bounds.PageBoundsConformance()
    pool, keys, sources, targets = case.pools(Spec("simulated", (5,), head_dim=128))
    got, race = simulate(mode, page_bounds, pool, keys, sources, targets, count=np.int32(4))
    case.check(got, pool, keys, sources[:4], targets[:4])
    assert not race


def test_declines_pools_that_it_cannot_copy_page_by_page():
    shape = CODE_DTYPES["int8"], (3, 2, 16, 64)
    with pytest.raises(NotImplementedError, match="minor dimension of pools must be a multiple of 128; got 64"):
        page_bounds(
            jnp.zeros((3, 2, 128)),
            jnp.zeros(shape[1], shape[0]),
            jnp.ones(1, jnp.int32),
            scales=jnp.ones((3, 2, 128)),
            implementation="mosaic_tpu",
        )
