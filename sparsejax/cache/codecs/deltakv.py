"""Sealed pages as DeltaKV latents: their pools, and the bytes of a whole model's cache under the codec."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels import codes
from pallas_kernels.deltakv import Grid, Weights, halves
from pallas_kernels.deltakv_pools import DeltaPools, empty, read_pages, shapes
from pallas_kernels.dispatch import Implementation
from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig


@dataclass(frozen=True)
class DeltaPages:
    """One layer's sealed pages in DeltaKV codes (see `pallas_kernels.deltakv`). Static.

    Attributes:
        grid: centers, references and rounding.
        latent: C, the width of a head group's latent.
        groups: A, head groups that are compressed apart.
        dtype: of centers or latents that are not rounded.
    """

    grid: Grid
    num_pages: int
    num_kv_heads: int
    head_dim: int
    latent: int
    groups: int
    dtype: np.dtype

    def __post_init__(self) -> None:
        width = 2 * self.num_kv_heads * self.head_dim
        if self.num_kv_heads % self.groups:
            raise ConfigError(f"head groups must divide the {self.num_kv_heads} KV heads; got {self.groups}")
        if not 0 < self.latent * self.groups <= width:
            raise ConfigError(f"a latent of {self.groups} x {self.latent} does not fit vectors of {width}")

    def _shapes(self) -> dict:
        sizes = (self.num_pages, self.num_kv_heads, self.head_dim, self.groups, self.latent, self.dtype)
        return shapes(self.grid, *sizes)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of one page by pool."""
        found = {name: one for name, one in self._shapes().items() if one is not None}
        return {name: math.prod(shape[1:]) * jnp.dtype(dtype).itemsize for name, (shape, dtype) in found.items()}

    @property
    def page_bytes(self) -> int:
        return sum(self.parts.values())

    def with_pages(self, num_pages: int) -> DeltaPages:
        return replace(self, num_pages=num_pages)

    def zeros(self) -> DeltaPools:
        """Empty pools."""
        sizes = (self.num_pages, self.num_kv_heads, self.head_dim, self.groups, self.latent, self.dtype)
        return empty(self.grid, *sizes)

    def seal(
        self,
        pools: DeltaPools,
        weights: Weights,
        raw: tuple[Float[Array, "R K P D"], Float[Array, "R K P D"]],
        sources: Int[Array, " M"],
        targets: Int[Array, " M"],
        tables: Int[Array, "B S"],
        rows: Int[Array, " M"],
        logical: Int[Array, " M"],
        count: Int[Array, ""],
        implementation: Implementation = None,
    ) -> DeltaPools:
        """Codes the first `count` full pages `sources` of `raw`, keys not rotated, into `targets`, in place.

        Page i is page ``logical[i]`` of the sequence whose pages are ``tables[rows[i]]``.
        """
        lists = (sources, targets, tables, rows, logical)
        return pallas_kernels.deltakv_encode(
            pools, weights, *raw, *lists, grid=self.grid, count=count, implementation=implementation
        )

    def open(
        self, pools: DeltaPools, weights: Weights, pages: Int[Array, " J"], table: Int[Array, " S"]
    ) -> tuple[Float[Array, "J K P D"], Float[Array, "J K P D"]]:
        """Keys, not rotated, and values of pages of one sequence, in the dtype of the pages: what dense attention
        takes where no kernel reads latents."""
        k, v = halves(read_pages(pools, weights, pages, table, self.grid), self.num_kv_heads)
        return k.swapaxes(1, 2).astype(self.dtype), v.swapaxes(1, 2).astype(self.dtype)

    def copy(self, pools: DeltaPools, source: Int[Array, " C"], target: Int[Array, " C"]) -> DeltaPools:
        """Copies whole pages ``source[i] -> target[i]``."""
        return jax.tree.map(lambda pool: pool.at[target].set(pool[source]), pools)


@dataclass(frozen=True)
class Plan:
    """How a model's cache is stored under DeltaKV.

    Attributes:
        grid: of the sparse layers.
        latents: width of the whole latent, over all head groups; one for all sparse layers, or one for each.
        filter_layers: the others: they hold all tokens in `filter_codec` with their key bounds, and select.
        sink: first tokens that each sparse layer keeps raw beside their codes.
    """

    grid: Grid
    latents: int | tuple[int, ...]
    filter_layers: Collection[int]
    filter_codec: str = "int8"
    groups: int = 1
    sink: int = 16
    bounds: bool = True

    def widths(self, layers: int) -> dict[int, int]:
        """Latent width of each sparse layer."""
        sparse = [layer for layer in range(layers) if layer not in self.filter_layers]
        widths = (self.latents,) * len(sparse) if isinstance(self.latents, int) else self.latents
        if len(widths) != len(sparse):
            raise ConfigError(f"{len(sparse)} sparse layers need as many latent widths; got {len(widths)}")
        return dict(zip(sparse, widths, strict=True))


def cache_bytes(cfg: DecoderConfig, plan: Plan, tokens: int, dtype: np.dtype = jnp.bfloat16) -> dict[str, int]:
    """Bytes by component that one sequence of `tokens` holds, all of it resident; compressor weights not included.

    ``dense`` is what the same tokens take in `dtype`, in whole pages; all else sums to ``total``. Every layer has one
    open page.
    """
    size, heads, dim = plan.grid.page_size, cfg.num_kv_heads, cfg.head_dim
    itemsize, pages = jnp.dtype(dtype).itemsize, -(-tokens // size)
    raw = 2 * heads * dim * itemsize
    found = {"open pages": cfg.num_layers * size * raw, "sinks": 0, "filter codes": 0, "filter bounds": 0}
    stored = {"int8": 1.0, "fp8": 1.0, "int4": 0.5}.get(plan.filter_codec)
    for _ in plan.filter_layers:
        if stored is None:
            found["filter codes"] += pages * size * raw
        else:
            sides = codes.scales_width(plan.filter_codec, size, dim) * itemsize
            found["filter codes"] += pages * heads * (int(2 * size * dim * stored) + sides)
        found["filter bounds"] += pages * heads * 2 * dim * itemsize if plan.bounds else 0
    for width in plan.widths(cfg.num_layers).values():
        if width % plan.groups:
            raise ConfigError(f"a latent of {width} does not divide into {plan.groups} head groups")
        layer = DeltaPages(plan.grid, pages, heads, dim, width // plan.groups, plan.groups, jnp.dtype(dtype))
        for name, held in layer.parts.items():
            found[name] = found.get(name, 0) + pages * held
        found["sinks"] += plan.sink * raw
    return found | {"total": sum(found.values()), "dense": cfg.num_layers * pages * size * raw}
