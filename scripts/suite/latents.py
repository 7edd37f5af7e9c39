"""Attention over DeltaKV latents: its numbers, and how fast it is beside XLA and beside dense attention."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from pallas_kernels import deltakv_pools
from pallas_kernels.deltakv import Grid
from pallas_kernels.deltakv_pools import DeltaPools
from suite import attention, clock, paged
from suite.attention import Shape
from suite.compare import compared
from suite.records import Run

LATENT = 4  # a latent is a quarter as wide as keys and values together
LENGTHS = (1500, 33, 0, 700, 64)
NARROW = dict(heads=8, kv_heads=4, head_dim=128)
TINY = Shape(2, 128, read=64, **NARROW)


def numerics(seed: int, tiny: bool, implementation: Any = None) -> Iterator[tuple[str, Run]]:
    """Cases of the stage of numbers."""
    grids = {"": Grid(), ", four neighbours": Grid(neighbours=4), ", page 64": Grid(page_size=64)}
    for name, grid in list(grids.items())[: 1 if tiny else None]:
        yield f"deltakv_decode_attention{name}", functools.partial(checked, grid, seed, implementation)


def cases(tiny: bool) -> Iterator[tuple[str, Run]]:
    """Cases of the stage of attention; the lists of the second shape are read by dense attention too."""
    shapes = (TINY,) if tiny else (Shape(32, 32768), Shape(8, 131072, read=2048))
    for shape in shapes:
        name = f"{shape.rows} x {shape.held}" + (f", lists of {shape.read}" if shape.read else "")
        for who, implementation in (("ours", None), ("XLA", "xla")):
            yield f"latents {name}: {who}", functools.partial(timed, shape, implementation)
        yield f"latents {name}: dense, equal batch", functools.partial(attention.ours, shape)


def random_pools(shape: Shape, grid: Grid, pages: int) -> DeltaPools:
    """Pools of any codes whose pages refer to any centers of sequences as long as `shape` holds."""
    latent = 2 * shape.kv_heads * shape.head_dim // LATENT
    extents = (pages, shape.kv_heads, shape.head_dim, 1, latent, jnp.bfloat16)
    found = {}
    for key, (name, one) in enumerate(deltakv_pools.shapes(grid, *extents, jax.default_backend()).items()):
        dims, dtype = one
        if jnp.issubdtype(dtype, jnp.floating):
            found[name] = 0.02 * paged.normal(key, dims, jnp.bfloat16)
        else:
            bits = jax.random.bits(jax.random.key(key), dims, jnp.uint16 if dtype == jnp.uint16 else jnp.uint8)
            found[name] = bits.astype(dtype)
    return DeltaPools(**found)._replace(
        references=found["references"] % (shape.held // grid.stride), index=found["index"] % grid.references
    )


def call_of(shape: Shape, grid: Grid) -> tuple[list[Any], dict[str, Any], int]:
    """Arguments, named arguments, and the bytes that a call must read: listed pages, and the centers they refer to."""
    ids, counts, lengths, logical, pages = attention.lists(shape)
    lengths = lengths // grid.page_size * grid.page_size
    pools = random_pools(shape, grid, pages)
    width, latent = 2 * shape.kv_heads * shape.head_dim, pools.latents.shape[3]
    weights = {"g": paged.normal(9, (1, width, latent), jnp.bfloat16) * latent**-0.5}
    frequencies = 10000.0 ** (-jnp.arange(0, shape.head_dim, 2, dtype=jnp.float32) / shape.head_dim)
    tables = attention.lists(dataclasses.replace(shape, read=None))[0][:, 0]
    of_page = sum(math.prod(pool.shape[1:]) * pool.dtype.itemsize for pool in pools)
    moved = shape.kv_tokens // grid.page_size * (of_page + grid.references * (width + 4 * shape.kv_heads))
    arguments = [attention.queries(shape), pools, weights, frequencies, ids, counts, lengths, tables]
    return arguments, {} if logical is None else {"logical_ids": logical}, moved


def timed(shape: Shape, implementation: str | None) -> dict[str, Any]:
    """Time per call as the engine calls it, and the coded bytes that it must read."""
    grid = Grid(shape.page)
    arguments, named, moved = call_of(shape, grid)
    options = {"grid": grid, "implementation": implementation}
    chosen, _ = kernels.explain("deltakv_decode_attention", *arguments, **named, **options)

    def call(*given: Any) -> jax.Array:
        plain, rest = given[: len(arguments)], dict(zip(named, given[len(arguments) :], strict=True))
        return kernels.deltakv_decode_attention(*plain, **rest, **options)

    seconds = clock.seconds(call, *arguments, *named.values())
    return {"backend": chosen, "seconds": seconds, "bytes": moved, "bytes_per_s": moved / seconds}


def checked(grid: Grid, seed: int, implementation: Any) -> dict[str, Any]:
    """Error against the reference in float32 on the same device, over all pages of rows of several lengths."""
    shape = Shape(len(LENGTHS), max(LENGTHS) // grid.page_size * grid.page_size, page=grid.page_size, **NARROW)
    arguments, _, _ = call_of(shape, grid)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    arguments[0] = paged.normal(seed % 1000, arguments[0].shape, jnp.bfloat16)
    arguments[5], arguments[6] = lengths[:, None] // grid.page_size, lengths
    op = functools.partial(kernels.deltakv_decode_attention, grid=grid, return_lse=True)
    chosen, _ = kernels.explain(
        "deltakv_decode_attention", *arguments, grid=grid, implementation=implementation
    )
    out, lse = jax.jit(functools.partial(op, implementation=implementation))(*arguments)
    wide = [arguments[0].astype(jnp.float32), *arguments[1:]]
    expected, expected_lse = jax.jit(functools.partial(op, implementation="reference"))(*wide)
    seen = np.asarray(expected_lse) > -1e29
    return {
        "backend": chosen,
        **compared(np.asarray(out), np.asarray(expected), 2e-2),
        "lse_error": float(np.abs(np.asarray(lse) - np.asarray(expected_lse))[seen].max(initial=0)),
    }
