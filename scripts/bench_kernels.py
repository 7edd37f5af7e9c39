"""Times every op on the default device at one size, and prints JSON.

    python scripts/bench_kernels.py --rows 4 --tokens-per-row 16384 --heads 12 --kv-heads 4

Inputs are random, every list is full, pools are donated and updated in place. Times are of warm calls, in
milliseconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.dispatch import holds_arrays
from pallas_kernels.workload import UPDATES, Call, Workload


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    work = workload(args)
    calls = work.calls()
    results = {op: measure(op, call, work, args) for op, call in calls.items() if not args.ops or op in args.ops}
    device = jax.devices()[0]
    sizes = {key: getattr(work, key) for key in work.__dataclass_fields__}
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "sizes": sizes, "ops": results}, indent=2))
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="*", help="only these ops")
    parser.add_argument("--implementation", help="one backend instead of the best one")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens-per-row", type=int, default=4096)
    parser.add_argument("--selected-tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256, help="new tokens of all rows")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--page-size", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--codec", default="int8", choices=("int8", "fp8", "int4"))
    parser.add_argument("--repeats", type=int, default=10)
    return parser


def workload(args: argparse.Namespace) -> Workload:
    return Workload(
        rows=args.rows,
        tokens=args.chunk,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        page_size=args.page_size,
        listed=-(-args.tokens_per_row // args.page_size),
        selected=-(-args.selected_tokens // args.page_size),
        dtype=args.dtype,
        codec=args.codec,
        platform=jax.default_backend(),
    )


def measure(op: str, call: Call, work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Compile seconds, the least and median milliseconds of warm calls, and the median of all threads' processor
    milliseconds, which other processes disturb less; or why none serves."""
    chosen, declined = pallas_kernels.explain(op, **call, implementation=args.implementation)
    if chosen is None:
        return {"backend": None, "declined": declined}
    rng = np.random.default_rng(0)
    given = {
        name: jax.tree.map(lambda leaf, name=name: fill(name, leaf, work, rng), value)
        for name, value in call.items()
        if holds_arrays(value)
    }
    static = {name: value for name, value in call.items() if name not in given}
    pools = tuple(name for name in UPDATES.get(op, ()) if name in given)
    function = functools.partial(getattr(pallas_kernels, op), implementation=chosen, **static)
    started = time.perf_counter()
    compiled = jax.jit(function, donate_argnames=pools).lower(**given).compile()
    compile_seconds = time.perf_counter() - started
    times, processor = [], []
    for _ in range(args.repeats + 1):
        started, cpu = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(compiled(**given))
        times.append(1e3 * (time.perf_counter() - started))
        processor.append(1e3 * (time.process_time() - cpu))
        updated = result if isinstance(result, tuple) and len(pools) > 1 else (result,)
        given |= {name: pool for name, pool in zip(UPDATES.get(op, ()), updated, strict=False) if name in pools}
    warm = times[1:] or times
    return {
        "backend": chosen,
        "compile_s": round(compile_seconds, 3),
        "min_ms": round(min(warm), 4),
        "median_ms": round(statistics.median(warm), 4),
        "median_cpu_ms": round(statistics.median(processor[1:] or processor), 4),
    }


def fill(name: str, like: jax.ShapeDtypeStruct, work: Workload, rng: np.random.Generator) -> jax.Array:
    """Values that make sense for an argument of this name."""
    shape = like.shape
    if name in ("page_ids", "targets"):
        full = rng.permutation(np.arange(1, max(work.pages, np.prod(shape) + 1)))
        return jnp.asarray(np.resize(full[: np.prod(shape)] % work.pages, shape), jnp.int32)
    if name == "query_starts":
        return jnp.asarray(np.linspace(0, work.tokens, shape[0]), jnp.int32)
    integers = {
        "counts": work.listed,
        "lengths": work.listed * work.page_size,
        "budgets": work.selected,
        "count": work.sealed,
    }
    if name in integers:
        return jnp.full(shape, integers[name], jnp.int32)
    if name == "offsets":
        return jnp.asarray(rng.integers(0, work.page_size, shape), jnp.int32)
    if name == "lse":
        return jnp.full(shape, np.log(work.listed * work.page_size) + 1, jnp.float32)
    if name == "scales":
        return jnp.asarray(rng.uniform(0.01, 0.02, shape), like.dtype)
    if name in ("k_codes", "v_codes"):
        return jnp.asarray(rng.integers(0, 100, shape), like.dtype)
    return jnp.asarray(rng.standard_normal(shape, np.float32), like.dtype)


if __name__ == "__main__":
    sys.exit(main())
