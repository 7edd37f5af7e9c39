"""The peer: scaled_dot_product_attention of torch on contiguous keys and values. Run as a process of its own.

Reads {name: [rows, tokens, heads, kv_heads, head_dim, chunk]} as JSON from its first argument and prints
{name: seconds}, or {name: reason} where a shape failed.
"""

from __future__ import annotations

import json
import sys


def main() -> int:
    try:
        import torch
    except ImportError:
        print(json.dumps({"unavailable": "torch is not installed"}))
        return 0
    if not torch.cuda.is_available():
        print(json.dumps({"unavailable": "torch sees no GPU"}))
        return 0
    results = {}
    for name, shape in json.loads(sys.argv[1]).items():
        try:
            results[name] = seconds(torch, *shape)
        except (RuntimeError, TypeError) as error:
            results[name] = f"{type(error).__name__}: {error}"[:300]
        torch.cuda.empty_cache()
    print(json.dumps(results))
    return 0


def seconds(torch, rows: int, tokens: int, heads: int, kv_heads: int, head_dim: int, chunk: int) -> float:
    """Seconds per call, the least of three loops."""

    def normal(*size):
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    q = normal(rows, heads, max(chunk, 1), head_dim)
    k, v = normal(rows, kv_heads, tokens, head_dim), normal(rows, kv_heads, tokens, head_dim)
    options = {"enable_gqa": True, "is_causal": chunk == tokens}

    def loop(count: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / count

    loop(3)
    count = int(min(1000, max(5, 0.1 / loop(3))))
    return min(loop(count) for _ in range(3))


if __name__ == "__main__":
    sys.exit(main())
