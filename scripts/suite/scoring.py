"""How fast the ops around attention do what they must: those that score, weigh and choose, and those that move pages.

Our kernels and XLA; a whole step of dynamic selection beside them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels as kernels
from suite import attention, clock, coded, paged
from suite.attention import Shape
from suite.records import Run

WINDOW = 32
type Call = tuple[Callable[..., jax.Array], tuple[jax.Array, ...], int, Callable[[], Any]]


def cases(tiny: bool) -> Iterator[tuple[str, Run]]:
    """The cases of these ops, in the stage of attention."""
    small = dict(heads=4, kv_heads=2, head_dim=64)
    long, few, one = (Shape(2, 128, **small),) * 3 if tiny else (Shape(32, 32768), Shape(4, 32768), Shape(1, 32768))
    int4 = lambda shape: dataclasses.replace(shape, codec="int4")  # noqa: E731
    wanted = [("page_scores", long), ("select_pages", long), ("attention_mass", long), ("attention_mass", int4(long))]
    wanted += [("window_scores", few), ("page_bounds", one), ("quantize_pages", int4(one)), ("open_pages", int4(one))]
    for op, shape in wanted:
        name = f"{op} {shape.rows} x {shape.held}" + (f", {shape.codec}" if shape.codec else "")
        for who, implementation in (("ours", None), ("XLA", "xla")):
            yield f"{name}: {who}", functools.partial(timed, op, shape, implementation)
    shape = Shape(2, 128, read=64, **small) if tiny else Shape(8, 131072, read=2048)
    yield f"decode {shape.rows} x {shape.held}, {shape.read} chosen by bounds: ours", functools.partial(quest, shape)


def timed(op: str, shape: Shape, implementation: str | None) -> dict[str, Any]:
    """Time per call, and the bytes that it must read and write once."""
    make = moving if op in ("page_bounds", "quantize_pages", "open_pages") else scoring
    call, arrays, moved, chosen = make(op, shape, implementation)
    seconds = clock.seconds(call, *arrays)
    return {"backend": chosen()[0], "seconds": seconds, "bytes": moved, "bytes_per_s": moved / seconds}


def bounds_of(shape: Shape, pages: int) -> jax.Array:
    return paged.normal(1, (pages, shape.kv_heads, 2 * shape.head_dim), jnp.bfloat16)


def scoring(op: str, shape: Shape, implementation: str | None) -> Call:
    """A call that gives numbers per page or token: the function, its arrays, bytes of bounds, keys or scores."""
    ids, counts, lengths, _, pages = attention.lists(shape)
    extents = (pages, shape.kv_heads, shape.page, shape.head_dim)
    lists = {"page_ids": ids, "counts": counts}
    q, moved, static = attention.queries(shape), shape.bytes // 2, {}
    if op in ("attention_mass", "window_scores"):
        lists["lengths"] = lengths
    if op == "select_pages":
        q = paged.normal(3, (shape.rows, shape.kv_heads, ids.shape[2]), jnp.float32)
        lists["budgets"], static = jnp.full(shape.rows, ids.shape[2] // 2, jnp.int32), {"width": ids.shape[2] // 2}
        moved = q.nbytes
    elif op == "page_scores":
        lists["bounds"], moved = bounds_of(shape, pages), 2 * moved // shape.page
    elif shape.codec:
        lists["k_pages"], _, lists["scales"] = coded.random_pools(shape.codec, *extents)
    else:
        lists["k_pages"] = attention.pools(*extents)[0]
    if op == "attention_mass":
        lists["lse"] = jnp.full(q.shape[:2], 12.0)
    if op == "window_scores":
        q = paged.normal(3, (shape.rows, WINDOW, *q.shape[1:]), jnp.bfloat16)
    names, arrays = zip(*lists.items(), strict=True)

    def call(q: jax.Array, *given: jax.Array) -> jax.Array:
        named = dict(zip(names, given, strict=True))
        found = getattr(kernels, op)(q, **named, **static, implementation=implementation)
        found = sum(x.sum() for x in found) if op == "select_pages" else found.max()
        return q + (1e-9 * found).astype(q.dtype)  # the next call must wait for all of it

    explain = functools.partial(kernels.explain, op, q, **lists, **static, implementation=implementation)
    return call, (q, *arrays), moved, explain


def moving(op: str, shape: Shape, implementation: str | None) -> Call:
    """A call that makes pages out of all pages, into new pools: the function, its arrays, bytes read and written."""
    pages = attention.lists(shape)[4]
    extents = (pages, shape.kv_heads, shape.page, shape.head_dim)
    dense = attention.pools(*extents)
    stored = coded.random_pools(shape.codec, *extents) if shape.codec else ()
    ids = jnp.arange(1, pages, dtype=jnp.int32)
    into, out_of = {
        "page_bounds": ((bounds_of(shape, pages),), dense[:1]),
        "quantize_pages": (stored, dense),
        "open_pages": (dense, stored),
    }[op]
    static = {} if op == "page_bounds" else {"head_dim": shape.head_dim}
    place = 1 if op == "page_bounds" else len(into)

    def arguments(out_of: Any, ids: jax.Array) -> list[Any]:
        # New arrays, as pools that are given to be updated would have to be copied for the next call.
        new = [lax.empty(pool.shape, pool.dtype) for pool in into]
        return [*new[:place], *out_of, ids, ids]

    def call(x: jax.Array, ids: jax.Array, *out_of: jax.Array) -> jax.Array:
        found = getattr(kernels, op)(*arguments(out_of, ids), **static, implementation=implementation)
        found = found if isinstance(found, tuple) else (found,)
        return x + sum(pool[(-1,) * pool.ndim].astype(jnp.float32) for pool in found)

    moved = sum(pool.nbytes for pool in (*into, *out_of))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*into, *out_of, ids, ids)]
    explain = functools.partial(kernels.explain, op, *shapes, **static, implementation=implementation)
    return call, (jnp.zeros(()), ids, *out_of), moved, explain


def quest(shape: Shape) -> dict[str, Any]:
    """A step that scores every page by its bounds, takes the best of each KV head and reads these."""
    ids, counts, lengths, _, pages = attention.lists(dataclasses.replace(shape, read=None))
    extents = (pages, shape.kv_heads, shape.page, shape.head_dim)
    arrays = (*attention.pools(*extents), bounds_of(shape, pages), ids, counts, lengths)
    budgets, ones = jnp.full(shape.rows, shape.read // shape.page, jnp.int32), jnp.ones(shape.rows, jnp.int32)

    def call(q: jax.Array, k_pages: Any, v_pages: Any, bounds: Any, ids: Any, counts: Any, lengths: Any) -> jax.Array:
        scores = kernels.page_scores(q, bounds, ids, counts)
        width = shape.read // shape.page
        chosen = kernels.select_pages(scores, ids, counts, budgets, width=width, sinks=ones, recents=ones)
        lists = (chosen.page_ids, chosen.counts, lengths)
        return kernels.paged_decode_attention(q, k_pages, v_pages, *lists, logical_ids=chosen.logical_ids)

    return attention.measured(shape, call, attention.queries(shape), *arrays)
