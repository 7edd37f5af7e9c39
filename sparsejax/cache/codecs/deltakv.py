"""Sealed pages as DeltaKV latents: how they are stored, made and read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.deltakv import Grid, Weights
from pallas_kernels.deltakv_pools import DeltaPools, empty, shapes
from pallas_kernels.dispatch import Implementation
from sparsejax.errors import ConfigError
from sparsejax.models.config import RopeConfig
from sparsejax.models.rope import inverse_frequencies

type Partial = tuple[Float[Array, "T H D"], Float[Array, "T H"]]


@dataclass(frozen=True)
class DeltaPages:
    """One layer's sealed pages in DeltaKV codes (see `pallas_kernels.deltakv`). Static.

    Open pages hold rotated keys, as those of every codec: sealing turns them back once per page, where keys kept
    unrotated would have to be turned in every step that reads them.

    Attributes:
        grid: centers, references and rounding.
        rope: how keys are rotated.
        latent: C, the width of a head group's latent.
        groups: A, head groups that are compressed apart.
        dtype: of centers or latents that are not rounded.
        platform: whose pools these are.
    """

    grid: Grid
    rope: RopeConfig
    num_pages: int
    num_kv_heads: int
    head_dim: int
    latent: int
    groups: int
    dtype: np.dtype
    platform: str = "cpu"

    def __post_init__(self) -> None:
        width = 2 * self.num_kv_heads * self.head_dim
        if self.num_kv_heads % self.groups:
            raise ConfigError(f"head groups must divide the {self.num_kv_heads} KV heads; got {self.groups}")
        if not 0 < self.latent * self.groups <= width:
            raise ConfigError(f"a latent of {self.groups} x {self.latent} does not fit vectors of {width}")

    def _shapes(self) -> dict:
        return shapes(*self._sizes)

    @property
    def _sizes(self) -> tuple[Any, ...]:
        extents = (self.num_pages, self.num_kv_heads, self.head_dim, self.groups, self.latent)
        return self.grid, *extents, self.dtype, self.platform

    @property
    def page_size(self) -> int:
        return self.grid.page_size

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
        return empty(*self._sizes)

    @property
    def _frequencies(self) -> Float[Array, " D2"]:
        return jnp.asarray(inverse_frequencies(self.rope, self.head_dim))

    @property
    def _facts(self) -> dict[str, Any]:
        """Static facts that every operation needs."""
        return {"grid": self.grid, "magnitude": self.rope.magnitude}

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
        """Codes the first `count` full pages `sources` of `raw` into `targets`, in place.

        Page i is page ``logical[i]`` of the sequence whose pages are ``tables[rows[i]]``.
        """
        args = (pools, weights, *raw, sources, targets, tables, rows, logical)
        return pallas_kernels.deltakv_encode(
            *args, frequencies=self._frequencies, count=count, implementation=implementation, **self._facts
        )

    def decode_attention(
        self,
        q: Float[Array, "B H D"],
        pools: DeltaPools,
        weights: Weights,
        tables: Int[Array, "B S"],
        *lists: Array,
        **options: Any,
    ) -> Partial:
        """One query per row over listed sealed pages: `page_ids`, `counts`, `lengths` as of any codec."""
        args = (q, pools, weights, self._frequencies, *lists, tables)
        return pallas_kernels.deltakv_decode_attention(*args, return_lse=True, **self._facts, **options)

    def prefill_attention(
        self, q: Float[Array, "T H D"], pools: DeltaPools, weights: Weights, *lists: Array, **options: Any
    ) -> Partial:
        """A ragged chunk over the sealed pages before each query's own page: `tables`, `lengths`, `query_starts`."""
        args = (q, pools, weights, self._frequencies, *lists)
        return pallas_kernels.deltakv_prefill_attention(*args, return_lse=True, **self._facts, **options)
