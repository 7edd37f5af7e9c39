"""How fast the ops that score pages and weigh tokens read what they must: our kernels and XLA."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as kernels
from suite import attention, clock, paged
from suite.attention import Shape
from suite.records import Run

WINDOW = 32


def cases(tiny: bool) -> Iterator[tuple[str, Run]]:
    """The cases of these ops, in the stage of attention."""
    small = dict(heads=4, kv_heads=2, head_dim=64)
    long, few = (Shape(2, 128, **small),) * 2 if tiny else (Shape(32, 32768), Shape(4, 32768))
    for op, shape in (("page_scores", long), ("attention_mass", long), ("window_scores", few)):
        for who, implementation in (("ours", None), ("XLA", "xla")):
            yield f"{op} {shape.rows} x {shape.held}: {who}", functools.partial(timed, op, shape, implementation)


def timed(op: str, shape: Shape, implementation: str | None) -> dict[str, Any]:
    """Time per call, and the bytes of bounds or keys that it must read once."""
    arguments = dict(zip(("page_ids", "counts", "lengths"), attention.lists(shape)[:3], strict=True))
    pages = attention.lists(shape)[4]
    extents = (pages, shape.kv_heads, shape.page, shape.head_dim)
    moved = shape.bytes // 2
    if op == "page_scores":
        del arguments["lengths"]
        arguments["bounds"] = paged.normal(1, (pages, shape.kv_heads, 2 * shape.head_dim), jnp.bfloat16)
        moved = 2 * moved // shape.page
    else:
        arguments["k_pages"] = attention.pools(*extents)[0]
    q = attention.queries(shape)
    if op == "attention_mass":
        arguments["lse"] = jnp.full(q.shape[:2], 12.0)
    if op == "window_scores":
        q = paged.normal(3, (shape.rows, WINDOW, *q.shape[1:]), jnp.bfloat16)
    names, arrays = zip(*arguments.items(), strict=True)
    chosen, _ = kernels.explain(op, q, **arguments, implementation=implementation)

    def call(q: jax.Array, *given: jax.Array) -> jax.Array:
        found = getattr(kernels, op)(q, **dict(zip(names, given, strict=True)), implementation=implementation)
        return q + (1e-9 * found.max()).astype(q.dtype)  # the next call must wait for all of it

    seconds = clock.seconds(call, q, *arrays)
    return {"backend": chosen, "seconds": seconds, "bytes": moved, "bytes_per_s": moved / seconds}
