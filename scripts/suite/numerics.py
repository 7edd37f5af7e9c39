"""Every op on the device against float64, on fresh inputs with poisoned spare pages."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import pallas_kernels as kernels
from suite import coded, exact, latents, paged, sparse
from suite.compare import compared
from suite.records import Run

LENGTHS = (1, 1500, 33, 0, 700, 64)
CHUNKS = (1, 300, 1, 0, 64, 17)
TOLERANCE = {"bf16": 1e-2, "f32": 2e-3}  # XLA multiplies float32 as tf32 on these GPUs

# name -> how the inputs differ from the default (8 heads on 2, head dim 128, pages of 32, bf16)
DECODE: dict[str, dict[str, Any]] = {
    "default": {},
    "page 16": {"page": 16},
    "page 64": {"page": 64},
    "page 128": {"page": 128},
    "head dim 64": {"head_dim": 64},
    "head dim 80": {"head_dim": 80},
    "head dim 96": {"head_dim": 96, "page": 16},
    "head dim 192": {"head_dim": 192},
    "head dim 256": {"head_dim": 256, "page": 64},
    "multi-head": {"heads": 4, "kv_heads": 4},
    "wide group": {"heads": 20, "kv_heads": 1},
    "head lists with gaps": {"head_lists": True, "gaps": True},
    "window, soft cap, sinks": {"window": 200, "soft_cap": 5.0, "sinks": True},
    "float32": {"dtype": "f32"},
}
PREFILL = {
    name: DECODE[name]
    for name in (
        "default",
        "page 16",
        "page 128",
        "head dim 64",
        "head dim 80",
        "head dim 256",
        "multi-head",
        "head lists with gaps",
        "window, soft cap, sinks",
        "float32",
    )
}


CODED = {
    "int8": {"codec": "int8"},
    "int8 page 16": {"codec": "int8", "page": 16, "head_lists": True, "gaps": True},
    "int8 page 128, head dim 256": {"codec": "int8", "page": 128, "head_dim": 256},
    "fp8": {"codec": "fp8"},
    "fp8 page 64": {"codec": "fp8", "page": 64, "window": 200, "soft_cap": 5.0, "sinks": True},
    "int4": {"codec": "int4"},
    "int4 page 64, head dim 64": {"codec": "int4", "page": 64, "head_dim": 64, "heads": 4, "kv_heads": 4},
    "int4 page 128, gaps": {"codec": "int4", "page": 128, "gaps": True, "head_dim": 96},
}


def cases(seed: int, tiny: bool, implementation: Any = None) -> Iterator[tuple[str, Run]]:
    """The cases of this stage; `tiny` ones are small enough for a CPU."""
    for op, specs in (("paged_decode_attention", DECODE), ("paged_prefill_attention", PREFILL)):
        for name in list(specs)[:1] if tiny else specs:
            run = functools.partial(attention, op, specs[name], seed, tiny, implementation)
            yield f"{op}, {name}", run
    for op, name in itertools.product(("quantized_decode_attention", "quantized_prefill_attention"), CODED):
        if name == "int4" or not tiny:
            yield f"{op}, {name}", functools.partial(attention, op, CODED[name], seed, tiny, implementation)
    yield from sparse.cases(seed, tiny, implementation)
    yield from latents.numerics(seed, tiny, implementation)
    yield "kv_write", functools.partial(kv_write, seed, implementation)


def attention(op: str, spec: dict[str, Any], seed: int, tiny: bool, implementation: Any) -> dict[str, Any]:
    """Error of one attention op, and which backend served it."""
    chunked = op.endswith("prefill_attention")
    lengths, chunks = (LENGTHS[2:4], CHUNKS[2:4]) if tiny else (LENGTHS, CHUNKS)
    given = dict(spec)
    codec = given.pop("codec", None)
    case = paged.draw(np.random.default_rng(seed), lengths, chunks if chunked else None, **given)
    tolerance = TOLERANCE[given.get("dtype", "bf16")]
    if codec is not None:
        case = coded.encode(dataclasses.replace(case, own_page=not chunked), codec)
        tolerance = 2e-2
    arrays = case.arrays() + ((case.starts,) if chunked else ())
    static = {k: v for k, v in case.options().items() if not hasattr(v, "shape")}
    given = {k: v for k, v in case.options().items() if hasattr(v, "shape")}
    function = functools.partial(getattr(kernels, op), implementation=implementation, return_lse=True, **static)
    chosen, reasons = kernels.explain(op, *arrays, implementation=implementation, **case.options())
    out, lse = jax.tree.map(np.asarray, jax.jit(function)(*arrays, **given))
    expected, expected_lse = exact.attend(case)
    return {
        "backend": chosen,
        "declined": {name: why for name, why in reasons.items() if "is not tried" not in why},
        **compared(out, expected, tolerance),
        "lse_error": float(np.abs(lse - expected_lse)[expected_lse > -1e29].max(initial=0)),
    }


def kv_write(seed: int, implementation: Any) -> dict[str, Any]:
    """Writes land where they should and nowhere else; page 0 may hold anything."""
    rng = np.random.default_rng(seed)
    pools = [rng.standard_normal((9, 2, 32, 128), np.float32) for _ in range(2)]
    new = [rng.standard_normal((40, 2, 128), np.float32) for _ in range(2)]
    slots = rng.permutation(8 * 32)[:40].astype(np.int32)
    pages, offsets = 1 + slots // 32, slots % 32
    got = jax.jit(functools.partial(kernels.kv_write, implementation=implementation))(*pools, *new, pages, offsets)
    for pool, values in zip(pools, new, strict=True):
        pool[pages, :, offsets] = values
    wrong = sum(int((np.asarray(g)[1:] != pool[1:]).sum()) for g, pool in zip(got, pools, strict=True))
    if wrong:
        raise AssertionError(f"{wrong} values differ")
    return {"max_error": 0.0}
