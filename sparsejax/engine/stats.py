"""Counters and gauges of a running engine, by name."""

from __future__ import annotations

from collections import Counter

from sparsejax.cache.group import CacheGroup
from sparsejax.engine.core import EngineCore
from sparsejax.engine.reads import recall_stats


def engine_stats(core: EngineCore) -> dict[str, int | float]:
    """Live pages and bytes, queue lengths and totals since start. Idle pages are free ones that the prefix cache uses
    until somebody needs them. Pages that decode steps hold and read are means over layers and KV heads."""
    scheduler, runner, kept = core.scheduler, core.runner, core.scheduler.conversations
    allocators, groups = scheduler.allocators, runner.state.kv.groups
    whole = CacheGroup.of_all(groups)
    live = Counter()
    for each, group in zip(allocators, groups, strict=True):
        live.update({codec: each.num_live * size for codec, size in group.codec_bytes.items()})

    def read_bytes(which: str, queries: str = "decode_queries") -> int:
        return whole.read_bytes(core.counters[f"decode_tiles_{which}"], core.counters[queries])

    return {
        "num_running": len(scheduler.running),
        "num_waiting": len(scheduler.waiting),
        "num_preemptions": scheduler.num_preemptions,
        "num_requests": core.counters["requests"],
        "num_aborted": core.counters["aborted"],
        "prompt_tokens": core.counters["prompt_tokens"],
        "generation_tokens": core.counters["generation_tokens"],
        "computed_tokens": core.counters["computed_tokens"],
        "prefix_cache_queries": core.counters["prefix_cache_queries"],
        "prefix_cache_hits": core.counters["prefix_cache_hits"],
        "steps": core.counters["steps"],
        "streamed_weight_bytes": core.counters["passes"] * runner.streamed_bytes,
        "decode_dense_bytes": read_bytes("dense", "decode_queries_dense"),
        "decode_queries": core.counters["decode_queries"],
        "decode_held_bytes": read_bytes("held"),
        "decode_read_bytes": read_bytes("read"),
        "decode_pages_held": core.counters["decode_tiles_held"] / whole.page_tiles,
        "decode_pages_read": core.counters["decode_tiles_read"] / whole.page_tiles,
        "lists_by_top_p": core.counters["lists_by_top_p"],
        "lists_at_budget": core.counters["lists_at_budget"],
        "recall_checks": core.counters["recall_checks"],
        "budgets_widened": core.counters["budgets_widened"],
        "budgets_dropped": core.counters["budgets_dropped"],
        **recall_stats(core.counters),
        "kv_live_pages": sum(each.num_live for each in allocators),
        "kv_free_pages": sum(each.num_free for each in allocators),
        "kv_idle_pages": sum(each.num_idle for each in allocators),
        "kv_kept_pages": kept.num_pages,
        "num_conversations": len(kept),
        **{f"conversations_{name}": kept.counters[name] for name in ("kept", "continued", "lowered", "dropped")},
        "continued_tokens": core.counters["continued_tokens"],
        "kv_live_bytes": sum(live.values()) + len(scheduler.running) * whole.row_bytes,
        **{f"kv_codec_{codec}_bytes": size for codec, size in live.items()},
        "kv_page_bytes": whole.page_bytes,
        **(core.tiers.stats() if core.tiers else {}),
        "compiles": runner.programs.num_compiles,
        "compiles_after_warmup": runner.programs.num_compiles - runner.programs.num_warm,
        "compile_seconds": runner.programs.compile_seconds,
    }
