"""A usual call of every op, as shapes: what reports, benchmarks and lowering tests ask about."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import codes, deltakv_pools, layouts
from pallas_kernels.deltakv import Grid
from pallas_kernels.deltakv_pools import DeltaPools

type Call = dict[str, Any]

# The arguments that an op returns updated, and so updates in place where they are donated.
UPDATES = {
    "kv_write": ("k_pages", "v_pages"),
    "page_bounds": ("bounds",),
    "quantize_pages": ("k_codes", "v_codes", "scales"),
    "open_pages": ("k_pages", "v_pages"),
    "deltakv_encode": ("pools",),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of one layer's step: B rows that list S pages each, T new tokens, M pages that seal."""

    rows: int = 4
    tokens: int = 64
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 32
    listed: int = 8
    selected: int = 4
    sealed: int = 16
    window: int = 16
    dtype: str = "bfloat16"
    codec: str = "int8"
    platform: str = "cpu"  # whose layouts the pools have

    @property
    def pages(self) -> int:
        """Pages of a pool: those of all rows, and the dump."""
        return self.rows * self.listed + 1

    def calls(self) -> dict[str, Call]:
        """Arguments by op and name, arrays as `jax.ShapeDtypeStruct`."""
        lists = {"page_ids": _ints(self.rows, 1, self.listed), "counts": _ints(self.rows, 1)}
        rows = lists | {"lengths": _ints(self.rows)}
        starts = {"query_starts": _ints(self.rows + 1)}
        query, chunk = self._q(self.rows), self._q(self.tokens)
        k, v = self._dense()
        dense, coded, keys = {"k_pages": k, "v_pages": v}, self._coded(), {"k_pages": k}
        bounds = {"bounds": self._float(self.pages, self.kv_heads, 2 * self.head_dim)}
        moves = {"page_ids": _ints(self.sealed), "targets": _ints(self.sealed), "count": _ints()}
        new = self._float(self.tokens, self.kv_heads, self.head_dim)
        at = {"page_ids": _ints(self.tokens), "offsets": _ints(self.tokens)}
        scores = _floats(self.rows, self.kv_heads, self.listed)
        dim = {"head_dim": self.head_dim}
        return {
            "kv_write": dense | {"k_new": new, "v_new": new} | at,
            "paged_decode_attention": query | dense | rows,
            "paged_prefill_attention": chunk | dense | rows | starts,
            "quantized_decode_attention": query | coded | rows,
            "quantized_prefill_attention": chunk | coded | rows | starts,
            "page_bounds": bounds | keys | moves,
            "page_scores": query | bounds | lists,
            "select_pages": {"scores": scores} | lists | {"budgets": _ints(self.rows), "width": self.selected},
            "attention_mass": query | keys | rows | {"lse": _floats(self.rows, self.heads)},
            "window_scores": self._q(self.rows, self.window) | keys | rows,
            "quantize_pages": coded | dense | moves | dim,
            "open_pages": dense | coded | moves | dim,
            **self._deltakv(query | lists | {"lengths": _ints(self.rows)}, chunk | starts),
        }

    def _deltakv(self, query: Call, chunk: Call) -> dict[str, Call]:
        """One head group whose latent is as wide as its keys."""
        grid, width = Grid(page_size=self.page_size), 2 * self.kv_heads * self.head_dim
        latent = width // 2
        extents = (self.pages, self.kv_heads, self.head_dim, 1, latent, jnp.dtype(self.dtype), self.platform)
        of = deltakv_pools.shapes(grid, *extents)
        pools = DeltaPools(**{name: None if one is None else jax.ShapeDtypeStruct(*one) for name, one in of.items()})
        linear = {"skip": (latent, width), "down": (latent, latent), "g": (width, latent)}
        weights = {name: _floats(1, *shape) for name, shape in (linear | {"gate_up": (2, latent, width)}).items()}
        page = self._float(self.pages, self.kv_heads, self.page_size, self.head_dim)
        common = {"pools": pools, "weights": weights, "tables": _ints(self.rows, self.listed), "grid": grid}
        names = ("page_ids", "targets", "rows", "logical")
        turned = {"frequencies": _floats(self.head_dim // 2)}
        return {
            "deltakv_encode": common | {"k_pages": page, "v_pages": page} | {n: _ints(self.sealed) for n in names},
            "deltakv_decode_attention": query | common | turned,
            "deltakv_prefill_attention": chunk | common | turned | {"lengths": _ints(self.rows)},
        }

    def _float(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))

    def _q(self, *shape: int) -> Call:
        return {"q": self._float(*shape, self.heads, self.head_dim)}

    def _shapes(self, rows: int) -> tuple[tuple[int, ...], bool]:
        """Shape of a pool with so many rows per page, and whether it holds both K and V."""
        pools, lanes = layouts.tpu_pools(self.head_dim) if self.platform == "tpu" else (2, self.head_dim)
        return (self.pages, self.kv_heads, rows, lanes), pools == 1

    def _dense(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None]:
        shape, both = self._shapes(self.page_size)
        return self._float(*shape), None if both else self._float(*shape)

    def _coded(self) -> Call:
        shape, both = self._shapes(self.page_size // (2 if self.codec == "int4" else 1))
        width = codes.scales_width(self.codec, self.page_size, self.head_dim)
        width += -width % layouts.LANES if self.platform == "tpu" else 0
        pool = jax.ShapeDtypeStruct(shape, codes.DTYPES[self.codec])
        scales = self._float(self.pages, self.kv_heads, width)
        return {"k_codes": pool, "v_codes": None if both else pool, "scales": scales}


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
