"""Counters and gauges of a running engine, by name."""

from __future__ import annotations

from sparsejax.engine.core import EngineCore


def engine_stats(core: EngineCore) -> dict[str, int | float]:
    """Live pages and bytes, queue lengths and totals since start."""
    scheduler, runner = core.scheduler, core.runner
    allocator = scheduler.allocator
    group, counters = runner.state.kv.group, core.counters
    return {
        "num_running": len(scheduler.running),
        "num_waiting": len(scheduler.waiting),
        "num_preemptions": scheduler.num_preemptions,
        "num_requests": counters["requests"],
        "num_aborted": counters["aborted"],
        "prompt_tokens": counters["prompt_tokens"],
        "generation_tokens": counters["generation_tokens"],
        "computed_tokens": counters["computed_tokens"],
        "steps": counters["steps"],
        "decode_held_bytes": group.read_bytes(counters["decode_pages_held"], counters["decode_rows"]),
        "decode_read_bytes": group.read_bytes(counters["decode_pages_read"], counters["decode_rows"]),
        "kv_live_pages": allocator.num_live,
        "kv_free_pages": allocator.num_free,
        "kv_live_bytes": allocator.num_live * group.page_bytes + len(scheduler.running) * group.row_bytes,
        "kv_page_bytes": group.page_bytes,
        "compiles": runner.programs.num_compiles,
        "compile_seconds": runner.programs.compile_seconds,
    }
