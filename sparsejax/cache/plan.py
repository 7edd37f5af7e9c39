"""How a model's cache is stored under DeltaKV, layer by layer, and what that takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from pallas_kernels.deltakv import Grid
from sparsejax.cache.codecs.deltakv import DeltaPages
from sparsejax.cache.group import CacheGroup, Layout, dense_group
from sparsejax.cache.layout import CodedLayout
from sparsejax.errors import ConfigError
from sparsejax.models.config import DecoderConfig


@dataclass(frozen=True)
class Plan:
    """The layers of a model under DeltaKV.

    Attributes:
        grid: of the sparse layers.
        latents: width of the whole latent, over all head groups; one for all sparse layers, or one for each.
        codecs: of latents, one for each sparse layer; None where all have that of the grid.
        filter_layers: the others: they hold all tokens in `filter_codec` and select.
        filter_codec: ``int4``, ``int8``, ``fp8`` or ``dense``.
        groups: head groups that are compressed apart.
    """

    grid: Grid
    latents: int | tuple[int, ...]
    filter_layers: Collection[int]
    filter_codec: str = "int4"
    groups: int = 1
    codecs: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        grid: Grid,
        shapes: Mapping[int, tuple[int, ...]],
        codecs: Mapping[int, str],
        num_layers: int,
        filter_codec: str | None = None,
    ) -> Plan:
        """That of a compressor whose g has `shapes` [A, W, C] by layer, and whose latents have `codecs` by layer, those
        of the grid where it names none; layers that it leaves out filter."""
        filters = tuple(layer for layer in range(num_layers) if layer not in shapes)
        latents = tuple(shapes[layer][0] * shapes[layer][2] for layer in sorted(shapes))
        groups = {shape[0] for shape in shapes.values()}
        if len(groups) != 1 or not set(shapes) <= set(range(num_layers)):
            raise ConfigError(
                f"a compressor needs layers of 0 to {num_layers - 1}, all with as many head groups; got layers "
                f"{sorted(shapes)} with {sorted(groups)}"
            )
        stored = tuple(codecs.get(layer, grid.latents) for layer in sorted(shapes)) if codecs else None
        return cls(grid, latents, filters, filter_codec or "int4", groups.pop(), stored)

    def widths(self, layers: int) -> dict[int, int]:
        """Latent width of each sparse layer."""
        return self._each(layers, self.latents, "latent widths")

    def grids(self, layers: int) -> dict[int, Grid]:
        """The grid of each sparse layer, with the codec of its latents."""
        codecs = self._each(layers, self.codecs or self.grid.latents, "latent codecs")
        return {layer: replace(self.grid, latents=codec) for layer, codec in codecs.items()}

    def _each[Fact](self, layers: int, given: Fact | tuple[Fact, ...], what: str) -> dict[int, Fact]:
        sparse = [layer for layer in range(layers) if layer not in self.filter_layers]
        each = given if isinstance(given, tuple) else (given,) * len(sparse)
        if len(each) != len(sparse):
            raise ConfigError(f"{len(sparse)} sparse layers need as many {what}; got {len(each)}")
        return dict(zip(sparse, each, strict=True))

    def group(
        self, cfg: DecoderConfig, dtype: np.dtype, num_pages: int, num_rows: int, platform: str = "cpu"
    ) -> CacheGroup:
        """The cache group of a model: `num_pages` pages of every layer, and open pages for `num_rows` rows."""
        size, dtype = self.grid.page_size, jnp.dtype(dtype)
        dense = dense_group(cfg, size, dtype, num_pages, platform)
        plain = dense_group(cfg, size, dtype, num_rows + 1).layout
        widths, grids, layouts = self.widths(cfg.num_layers), self.grids(cfg.num_layers), []
        for layer in dense.layers:
            made: Layout = dense.layout
            if layer in widths:
                shape = (num_pages, cfg.num_kv_heads, cfg.head_dim)
                if widths[layer] % self.groups:
                    raise ConfigError(f"a latent of {widths[layer]} does not divide into {self.groups} head groups")
                latent = widths[layer] // self.groups
                pages = DeltaPages(grids[layer], cfg.rope, *shape, latent, self.groups, dtype, platform)
                made = CodedLayout(pages, plain)
            elif self.filter_codec != "dense":
                made = CodedLayout.of(dense.layout, self.filter_codec, num_rows, platform)
            layouts.append(made)
        return CacheGroup(dense.layers, tuple(layouts))


def cache_bytes(
    cfg: DecoderConfig,
    plan: Plan,
    tokens: int,
    dtype: np.dtype = jnp.bfloat16,
    *,
    bounds: bool = False,
    platform: str = "cpu",
) -> dict[str, int]:
    """Bytes by component that one sequence of `tokens` holds, all of it resident; compressor weights not included.

    ``dense`` is what the same tokens take in `dtype`, in whole pages; all else sums to ``total``. Every layer has one
    open page. With `bounds` filter layers hold the key bounds of their pages, too, as selection by them needs. Pools
    are laid out for `platform`, dense ones too: ``cpu``, ``gpu`` or ``tpu``.
    """
    pages, group = -(-tokens // plan.grid.page_size), plan.group(cfg, dtype, 1, 1, platform)
    found = {"open pages": group.row_bytes, "filter pages": 0, "filter bounds": 0}
    for layout in group.layouts:
        parts = layout.sealed.parts if layout.latent else {"filter pages": layout.page_bytes}
        if bounds and not layout.latent:
            parts["filter bounds"] = cfg.num_kv_heads * 2 * cfg.head_dim * jnp.dtype(dtype).itemsize
        for name, held in parts.items():
            found[name] = found.get(name, 0) + pages * held
    dense = dense_group(cfg, plan.grid.page_size, jnp.dtype(dtype), pages, platform)
    return found | {"total": sum(found.values()), "dense": dense.pool_bytes}
