"""Measures configurations of the decode kernels on the GPU of this machine and keeps those that beat the heuristic.

    python scripts/tune.py                       # writes pallas_kernels/tuning/<device>.json
    python scripts/tune.py --match "32K" --output /tmp/tuned.json

Every configuration must give the heuristic's result before it is timed. Entries of other shapes are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from suite import bare  # noqa: E402

GAIN = 0.97  # an entry must take at most this share of the heuristic's time


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    bare.install()
    import jax
    from suite import attention

    from pallas_kernels import tuning

    if jax.default_backend() not in ("gpu", "cuda"):
        print(f"there is nothing to tune on {jax.default_backend()}: the kernels need a CUDA GPU", file=sys.stderr)
        return 2
    file = options.output or tuning.path(tuning.device_kind())
    found = json.loads(file.read_text()) if file.exists() else []
    for name, shape in attention.DECODE.items():
        if options.match in name and not shape.skewed:
            found = merged(found, tuned(name, shape))
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} entries in {file}")
    return 0


def tuned(name: str, shape: Any) -> dict[str, Any] | None:
    """The entry of one shape; None if nothing beats the heuristic."""
    import numpy as np
    from suite import attention, clock

    from pallas_kernels import dispatch

    op, arguments, named = attention.call_of(shape)
    scale = shape.head_dim**-0.5
    backend = dispatch.backend(op, "mosaic_gpu")

    def run(config: Any) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            plain = given[: len(arguments)]
            rest = dict(zip(named, given[len(arguments) :], strict=True))
            return backend(*plain, **rest, scale=scale, config=config)

        return call

    everything = [*arguments, *named.values()]
    candidates = candidates_of(op, arguments)
    expected = np.asarray(run(candidates[0])(*everything), np.float32)

    def measure(config: Any) -> float:
        out = np.asarray(run(config)(*everything), np.float32)
        if not np.allclose(out, expected, atol=2e-2, rtol=2e-2):
            raise ValueError("gives other numbers than the heuristic's configuration")
        return clock.seconds(run(config), *everything, target=0.05)

    config, seconds, default = best(candidates, measure, name)
    if seconds > GAIN * default:
        return None
    ids = arguments[-3]
    return {
        "op": op,
        "stored": str(arguments[1].dtype),
        "head_dim": shape.head_dim,
        "page": shape.page,
        "pairs": shape.rows * shape.kv_heads,
        "tokens": ids.shape[2] * shape.page,
        "config": vars(config),
        "seconds": seconds,
        "heuristic_seconds": default,
    }


def candidates_of(op: str, arguments: Sequence[Any]) -> list[Any]:
    """Configurations of one call, the heuristic's first."""
    from pallas_kernels import codes
    from pallas_kernels.mosaic_gpu import coded_decode, decode

    q, pool, ids = arguments[0], arguments[1], arguments[-3]
    rows, kv_heads, lists, width, head_dim = q.shape[0], pool.shape[1], *ids.shape[1:], q.shape[2]
    if op == "paged_decode_attention":
        return decode.Shape(rows, kv_heads, 1, lists, width, pool.shape[2], head_dim).candidates(pool.dtype.itemsize)
    scales = arguments[3]
    page, codec = codes.page_size(pool), codes.codec_of(pool)
    shape = coded_decode.Shape(rows, kv_heads, 1, lists, width, page, head_dim, codec, scales.shape[2])
    return shape.candidates(scales.dtype.itemsize)


def best(candidates: Sequence[Any], measure: Callable[[Any], float], name: str) -> tuple[Any, float, float]:
    """The fastest candidate, its seconds, and those of the first one. Those that fail are passed over."""
    times = {}
    for config in candidates:
        try:
            times[config] = measure(config)
        except Exception as error:  # noqa: BLE001 (a configuration may fail in any way, and the others count)
            if config is candidates[0]:
                raise
            print(f"{name}: {config} fails: {type(error).__name__}: {error}"[:300])
        else:
            print(f"{name}: {config} takes {times[config] * 1e6:.1f} us", flush=True)
    fastest = min(times, key=times.__getitem__)
    return fastest, times[fastest], times[candidates[0]]


def merged(entries: list[dict[str, Any]], entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    """`entries` with `entry` in the place of the one for the same call."""
    if entry is None:
        return entries
    same = ("op", "stored", "head_dim", "page", "pairs", "tokens")
    return [e for e in entries if any(e[k] != entry[k] for k in same)] + [entry]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only shapes whose name contains this")
    parser.add_argument("--output", type=Path, help="JSON file; the package's own for this device if not given")
    return parser


if __name__ == "__main__":
    sys.exit(main())
